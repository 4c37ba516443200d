"""Plans from configs alone: figures, memory, disk, time, and the refusal of a run that the disk has no room for."""

from __future__ import annotations

import dataclasses
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from hfsd import disk, memory, models, pipeline, plain, plan, settings
from hfsd.errors import BadRequest, HfsdError
from hfsd.settings import Job
from tests import tiny

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama-3.1-8B config and nothing else."""
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("bare") / "llama-3.1-8b"
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def small_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the step that is run on shapes: these tests are not about it."""
    monkeypatch.setattr(memory, "_above", lambda *_: 10**9)


def _full(folder: Path, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 10**12 - free, free))


def test_the_design_s_headline_from_a_config_alone(bare: Path, small_step: None) -> None:
    made = plan.make(tiny.recipe(bare, prune__blocks=6), tokens_per_second=1000)
    told = plan.text(made)
    assert "8.030 B -> 6.722 B parameters: cut by 16.30%; matmul FLOPs per token by 17.44%" in told
    assert "131 kB" in told and "106 kB" in told  # of cache per token, 2 x 8 heads x 128 x 2 bytes x 32 or 26 blocks
    assert made.pruned[0].checkpoint_bytes == 2 * 6_721_589_248
    assert made.lengths.source.startswith("bounds: the model has no tokenizer here")
    assert plain.from_json(plan.Plan, json.loads(plain.dumps(made))) == made


def test_no_probe_and_no_rate_give_no_times(bare: Path, small_step: None) -> None:
    made = plan.make(tiny.recipe(bare), probe=False)
    assert all(t.seconds is None for t in made.times) and "no times" in plan.text(made)


def test_a_probe_that_does_not_fit_says_so(bare: Path, small_step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfsd.probe._free", lambda: 10**9)
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
    assert times["rewrite"].at_most and not times["scan"].at_most
    assert made.lengths.source.startswith("counted on")
    twice = plan.make(tiny.recipe(model_folder), tokens_per_second=200)
    assert twice.seconds == pytest.approx(made.seconds / 2)


def test_the_probe_measures_a_tiny_model(model_folder: Path, small_step: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hfsd.probe._in_turns.__defaults__", (0.05,))  # seconds of each kind of work
    made = plan.make(tiny.recipe(model_folder))
    assert made.rate.startswith("measured here") and made.seconds > 0
    assert all(t.seconds is not None for t in made.times)


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


def _memory(folder: Path, method: str = "lora", **sft: Any) -> memory.Memory:
    made = tiny.recipe(folder, train__method=method, **({"train__lora": {}} if method == "full" else {}))
    train = made.train.model_copy(update={"sft": {**made.train.sft, **sft}})
    config = models.load_config(folder)
    return memory.of_arm(Job("sft", 0, train, 0, Path("."), longest=64), config, config)


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


def test_disk_of_a_plan_is_what_a_run_leaves(tiny_run: Path, model_folder: Path) -> None:
    recipe = tiny.recipe(model_folder)
    sizes = disk.sizes(recipe)
    assert sizes is not None and sizes.fetched
    adapter = next(tiny_run.glob("train/*/adapter/adapter_model.safetensors")).stat().st_size
    names = ["prune", *(f"train/{p.name}" for p in sorted((tiny_run / "train").iterdir()))]
    for need in disk.needs(recipe, sizes, names, tiny_run, adapter):
        written = sum(p.stat().st_size for p in (tiny_run / need.step).rglob("*.safetensors"))
        assert need.stays == pytest.approx(written, rel=0.05)  # headers apart, which are much of so small a file


def test_full_training_s_checkpoints_are_counted(model_folder: Path) -> None:
    recipe = tiny.recipe(model_folder, train__method="full", train__lora={})
    sizes = disk.sizes(recipe)
    assert sizes is not None
    cut = sizes.kept(recipe, least=False)
    need = disk.needs(recipe, sizes, ["train/sft-gsm-symbolic"], Path("runs"), None)[0]
    assert need.passes == 3 * 3 * 4 * cut.params + 4 * cut.params  # 3 at a time, and the last weights


def test_a_run_that_the_disk_has_no_room_for_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(model_folder)
    sizes = disk.sizes(recipe)
    assert sizes is not None
    needed = 3 * sizes.kept(recipe, least=True).bytes  # the cut, and two arms merged
    _full(tmp_path, needed - 1, monkeypatch)
    with pytest.raises(HfsdError, match=r"free, and this run needs at least .* there \(prune .*, train/sft.*--out"):
        pipeline.run(recipe, out=tmp_path / "run")
    assert not list(tmp_path.rglob("START.json"))


def test_what_is_done_is_not_needed_again(
    tiny_run: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(model_folder)
    _full(tmp_path, 0, monkeypatch)
    disk.check(recipe, tiny_run, [])
    disk.check(recipe, tiny_run, [("report", tiny_run / "report")])
    begun = [("prune", tiny_run / "prune")]  # a killed step that left its files
    disk.check(recipe, tiny_run, begun)
    with pytest.raises(HfsdError, match="has 0 B free"):
        disk.check(recipe, tmp_path, [("prune", tmp_path / "prune")])


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
