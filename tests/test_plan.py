"""Plans from configs alone: figures, memory, and times."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from hfsd import memory, models, plain, plan, probe, recipes, settings
from hfsd.errors import BadRequest
from hfsd.probe import Line, Rates
from hfsd.settings import Job
from hfsd.workload import Work
from tests import tiny


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bare_llama8b(tmp_path_factory.mktemp("bare"))


@pytest.fixture
def small_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the step that is run on shapes: these tests are not about it."""
    monkeypatch.setattr(memory, "_above", lambda *_: 10**9)


def test_the_design_s_headline_from_a_config_alone(bare: Path, small_step: None) -> None:
    made = plan.make(tiny.recipe(bare, prune__blocks=6), tokens_per_second=1000)
    told = plan.text(made)
    assert "8.030 B -> 6.722 B parameters: cut by 16.30%; matmul FLOPs per token by 17.44%" in told
    assert "131 kB" in told and "106 kB" in told  # of cache per token, 2 x 8 heads x 128 x 2 bytes x 32 or 26 blocks
    assert made.pruned[0].checkpoint_bytes == 2 * 6_721_589_248
    assert (made.disk[0].step, made.disk[0].stays) == ("(fetch)", 2 * 8_030_261_248)
    assert made.lengths[0].source.startswith("bounds: the model has no tokenizer here")
    assert plain.from_json(plan.Plan, json.loads(plain.dumps(made))) == made


def test_no_probe_and_no_rate_give_no_times(bare: Path, small_step: None) -> None:
    made = plan.make(tiny.recipe(bare), probe=False)
    assert all(t.seconds is None for t in made.times) and "no times" in plan.text(made)


def test_a_probe_that_does_not_fit_says_so(bare: Path, small_step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "free_memory", lambda: 10**9)
    made = plan.make(tiny.recipe(bare))
    assert made.rate.startswith("no times: the probe needs 11.90 GB for a model of 2 blocks, and 1.00 GB of memory")
    assert all(t.seconds is None for t in made.times)


def test_a_stated_rate_gives_times_by_tokens_and_flops(model_folder: Path, small_step: None) -> None:
    made = plan.make(tiny.recipe(model_folder), tokens_per_second=100)
    times = {t.step.split("/")[0]: t for t in made.times}
    assert {"scan", "rewrite", "train", "compare"} <= times.keys()
    share = made.pruned[0].matmul_flops / made.original.matmul_flops
    trained = times["train"]
    assert trained.tokens is not None and trained.seconds == pytest.approx(3 * share * trained.tokens / 100, rel=0.01)
    assert times["rewrite"].up_to and not times["scan"].up_to
    assert "up to" in plan.text(made) and "left out: processes that start" in plan.text(made)
    assert made.lengths[0].source.startswith("counted on")
    twice = plan.make(tiny.recipe(model_folder), tokens_per_second=200)
    assert twice.seconds == pytest.approx(made.seconds / 2)


def test_the_probe_measures_a_tiny_model(model_folder: Path, small_step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfsd.probe._in_turns.__defaults__", (0.05,))  # seconds of each kind of work
    asked: list[bool] = []
    real = settings.adapted
    monkeypatch.setattr(settings, "adapted", lambda job, model, how: asked.append(how) or real(job, model, how))
    made = plan.make(tiny.recipe(model_folder, train__sft__gradient_checkpointing=True))
    assert made.rate.startswith("measured here") and made.seconds > 0
    assert all(t.seconds is not None for t in made.times)
    assert asked and all(asked)  # a step is measured with the checkpointing that the arm is trained with


def test_times_of_known_rates() -> None:
    rates = Rates(Line(1, 2), Line(10, 20), Line(0.5, 0.25), Line(1, 0.5), rows=3, measured="made up")
    work = [
        Work("scan", "original", forward=3),
        Work("rewrite", "original", passes=2, rows=3, bound=True),
        Work("rewrite", "original", passes=2, rows=1),
        Work("rewrite", "original", passes=1, rows=5),
        Work("train/sft", "pruned", trained=2),
        Work("evaluate/sft", "pruned", forward=1),
        Work("evaluate/sft", "pruned", unknown="the size of x is not known here"),
        Work("evaluate/other", "pruned", unknown="no"),
    ]
    times, rate = plan._times(work, {"original": 6, "pruned": 4}, {}, None, lambda: rates)
    found = {t.step: t for t in times}
    assert found["scan"].seconds == 3 * (1 + 2 * 6)
    # a pass of one row takes 2 s, of three 4 s: so each further row 1 s
    assert found["rewrite"].seconds == 2 * 4 + 2 * 2 + 6 and found["rewrite"].up_to
    assert found["rewrite"].tokens == 2 * 3 + 2 + 5
    assert found["train/sft"].seconds == 2 * (10 + 20 * 4)
    assert found["evaluate/sft"].seconds == 1 + 2 * 4 and found["evaluate/sft"].partly
    assert found["evaluate/other"].seconds is None and found["evaluate/other"].note == "no"
    assert rate == "made up"


def _job(folder: Path) -> Job:
    return Job("sft", 0, tiny.recipe(folder).train, 0, Path("."), longest=64)


def test_the_probe_keeps_to_the_model_s_positions(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import GPT2Config

    monkeypatch.setattr("hfsd.probe._in_turns.__defaults__", (0.01,))
    config = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_positions=128, vocab_size=tiny.VOCABULARY)
    found = probe.run(config, _job(model_folder), 2, 5000, checkpointed=False)
    assert found.single.at(2) > 0 and "behind 96 tokens" in found.measured


def test_a_class_that_cannot_be_probed_gives_no_times(
    model_folder: Path, small_step: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("no such cache")

    monkeypatch.setattr(probe, "_decode", fails)
    monkeypatch.setattr("hfsd.probe._in_turns.__defaults__", (0.01,))
    made = plan.make(tiny.recipe(model_folder))
    assert made.rate.startswith("no times: llama cannot be probed (RuntimeError: no such cache)")


def test_unlike_blocks_give_bounds(tmp_path: Path, small_step: None) -> None:
    from transformers import Qwen3MoeConfig

    from tests import architectures

    row = next(r for r in architectures.TABLE if r.kind == "Qwen3Moe")
    Qwen3MoeConfig(**architectures.BASE | row.config).save_pretrained(tmp_path)
    made = plan.make(tiny.recipe(tmp_path, prune__blocks=1), probe=False)
    least, most = made.pruned
    assert least.params < most.params < made.original.params
    assert " to " in plan.text(made).splitlines()[2]
    alone = plan.make(tiny.recipe(tmp_path, prune__blocks=None, prune__remove="1:2"), probe=False)
    assert len(alone.pruned) == 1 and alone.pruned[0].params == most.params


def _memory(folder: Path, method: str = "lora", arm: str = "sft", dtype: str = "auto", **sft: Any) -> memory.Memory:
    made = tiny.recipe(folder, train__method=method, **({"train__lora": {}} if method == "full" else {}))
    train = made.train.model_copy(update={"sft": {**made.train.sft, **sft}})
    config = models.load_config(folder)
    return memory.of_arm(Job(arm, 0, train, 0, Path("."), dtype, longest=64), config, config)


def test_memory_of_few_blocks_extrapolates_to_that_of_all(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = _memory(model_folder)
    monkeypatch.setattr(memory, "FEW", (2, 6))
    assert _memory(model_folder).activations == few.activations


def test_memory_of_a_step_is_that_of_a_real_one(model_folder: Path) -> None:
    """The storages that live at a time, on real tensors: gradients and all that the backward pass needs."""
    import torch
    from peft import get_peft_model

    found = _memory(model_folder, gradient_checkpointing=False)
    model = models.load(model_folder, "float32")
    settings.fuse_head(model)
    train = tiny.recipe(model_folder).train
    tuned = get_peft_model(model, settings.lora(Job("sft", 0, train, 0, Path(".")), model)).train()
    ids, seen = torch.zeros(4, 64, dtype=torch.long), torch.ones(4, 64, dtype=torch.long)
    seen[1, 50:] = 0  # a batch has padding, with which a mask is made
    with memory._live([*tuned.parameters(), *tuned.buffers()]) as watch:
        tuned(input_ids=ids, attention_mask=seen, labels=ids, use_cache=False, fused_lm_head=True).loss.backward()
    assert found.activations is not None
    assert found.activations + found.gradients == pytest.approx(watch.peak, rel=0.01)


def test_memory_by_method(model_folder: Path) -> None:
    lora, full = _memory(model_folder), _memory(model_folder, "full")
    whole = models.count_params(models.load(model_folder))
    assert full.trained_params == whole and (full.gradients, full.optimizer) == (4 * whole, 8 * whole)
    assert lora.optimizer == 8 * lora.trained_params and 0 < lora.trained_params < whole
    checkpointed = _memory(model_folder, gradient_checkpointing=True)
    assert checkpointed.checkpointing and (checkpointed.activations or 0) < (lora.activations or 0)
    taught = _memory(model_folder, "full", "sdd+kd", dtype="bfloat16")
    assert (taught.dtype, taught.teacher) == ("float32", 2 * whole)  # the original is loaded in the recipe's own type


def test_bad_requests(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="tokens-per-second is -1"):
        plan.make(tiny.recipe(model_folder), tokens_per_second=-1)
    with pytest.raises(BadRequest, match="6 of the 6 blocks"):
        plan.make(tiny.recipe(model_folder, prune__blocks=6))
    with pytest.raises(BadRequest, match=r"no config\.json"):
        plan.make(tiny.recipe(tmp_path))


def test_a_class_that_does_not_run_on_shapes_says_so(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(memory, "_above", fails)
    found = _memory(model_folder)
    assert found.activations is None and found.total is None and "data-dependent" in found.note
    assert dataclasses.asdict(found)["weights"] > 0


def test_the_command_plans_for_a_run_directory(model_folder: Path, tmp_path: Path, small_step: None) -> None:
    import yaml
    from typer.testing import CliRunner

    from hfsd.cli import app

    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipes.dump(tiny.recipe(model_folder))))
    (tmp_path / "elsewhere").mkdir()
    asked = ["plan", str(file), "--no-probe", "--out", str(tmp_path / "elsewhere" / "run")]
    done = CliRunner().invoke(app, asked, catch_exceptions=False)
    assert done.exit_code == 0 and f"disk ({tmp_path / 'elsewhere'} has" in done.output
