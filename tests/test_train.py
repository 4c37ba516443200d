"""Arms that share everything but the text; rows that are too long; wrong settings; adapters and merges."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest

from hfsd import models, train
from hfsd.blocks_recovery import Train
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.records import CONFIGS, PrunePlan, Variant
from tests import tiny

ARMS = ("sft", "self-distilled")
WEIGHTS = {"model.safetensors": "aa"}
PLAN = PrunePlan(8, (0, 1, 2, 5, 6, 7), "by hand")  # the tiny model's six blocks are what is left of eight


def _parquet(path: Path, texts: list[str], ids: list[str] | None = None) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "id": (ids or [f"r{i}" for i in range(len(texts))])[i],
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "completion": [{"role": "assistant", "content": text}],
        }
        for i, text in enumerate(texts)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def _data(folder: Path, sft: list[str], own: list[str], **more: list[str]) -> dict[str, Path]:
    return {name: _parquet(folder / f"{name}.parquet", t, **more) for name, t in zip(CONFIGS, (sft, own), strict=True)}


def _pruned(base: Path, plan: PrunePlan = PLAN, weights: dict[str, str] = WEIGHTS) -> train.Pruned:
    return train.Pruned(base, plan, weights)


def _never() -> Any:
    pytest.fail("this arm needs no teacher")


def _recipe(**sft: object) -> Train:
    return Train(lora={"r": 2}, sft={"per_device_train_batch_size": 2, **sft})


def _run(base: Path, data: dict[str, Path], arm: str, asked: Train, root: Path) -> train.TrainReport:
    return train.run(_pruned(base), data, Variant(arm, "d"), asked, root / f"{arm}-d", lambda: models.load(base))


def test_a_row_too_long_for_one_arm_leaves_all_arms(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = _data(tmp_path, ["a", "b", "c", "d"], ["a", "b" * 300, "c", "d"])
    made = [_run(model_folder, data, arm, _recipe(max_length=200), tmp_path / "train") for arm in ARMS]
    assert [r.rows for r in made] == [3, 3] and made[0].hyperparameters["rows_left_out"] == 1
    assert made[0].fairness == made[1].fairness
    assert "1 of 4 rows exceed 200 tokens in an arm: left out of all" in capsys.readouterr().err
    with pytest.raises(HfsdError, match=r"none of 4 rows is within train.sft.max_length 5 tokens"):
        _run(model_folder, data, "sft", _recipe(max_length=5), tmp_path / "other")


def test_only_the_completion_and_its_end_of_turn_are_trained(model_folder: Path, tmp_path: Path) -> None:
    made = _run(model_folder, _data(tmp_path, ["abc"] * 2, ["x"] * 2), "sft", _recipe(), tmp_path / "train")
    assert made.tokens == 2 * len("abc" + "E" + "\n")  # bytes are tokens; E is the end-of-turn token


def test_an_unfair_second_arm_is_refused_before_it_is_trained(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a"] * 4, ["b"] * 4)
    _run(model_folder, data, "sft", _recipe(), tmp_path / "train")
    with pytest.raises(Refusal, match=r"self-distilled-d and sft-d would differ in hyperparameters, not only"):
        _run(model_folder, data, "self-distilled", _recipe(learning_rate=1e-3), tmp_path / "train")
    with pytest.raises(Refusal, match="would differ in base_weights"):
        other = _pruned(model_folder, weights={"x": "bb"})
        out = tmp_path / "train" / "self-distilled-d"
        train.run(other, data, Variant("self-distilled", "d"), _recipe(), out, _never)
    assert not (tmp_path / "train" / "self-distilled-d" / "adapter").exists()


def test_other_rows_or_another_order_are_refused(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a", "b"], ["a", "b"])
    _parquet(data["reference"], ["a", "b"], ids=["r1", "r0"])
    with pytest.raises(Refusal, match="other rows or another order"):
        _run(model_folder, data, "sft", _recipe(), tmp_path / "train")


def test_a_loss_that_is_not_finite_stops_the_arm(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(HfsdError, match=r"the loss is nan at step \d+; lower train.sft.learning_rate"):
        data = _data(tmp_path, ["a" * 50] * 12, ["b"] * 12)
        _run(
            model_folder,
            data,
            "sft",
            _recipe(learning_rate=1e30, max_grad_norm=0.0, warmup_steps=0),
            tmp_path / "train",
        )


def test_unknown_and_owned_fields() -> None:
    faults = train.check_fields(Train(lora={"rank": 4}, sft={"learning_rat": 1, "output_dir": "x"}))
    assert len(faults) == 3
    assert faults[0] == "train.sft.learning_rat: SFTConfig has no such field (did you mean 'learning_rate'?)"
    assert "set by the run itself" in faults[1] and faults[2].startswith(
        "train.lora.rank: LoraConfig has no such field"
    )
    assert train.check_fields(Train()) == []


def test_values_that_trl_refuses_are_one_line(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a"] * 2, ["b"] * 2)
    with pytest.raises(BadRequest, match="TRL or PEFT refuses these settings") as caught:
        _run(model_folder, data, "sft", _recipe(lr_scheduler_type="cosinus"), tmp_path / "train")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "lora"),
        ({"method": "dora"}, "dora"),
        ({"method": "full", "lora": {}}, "full"),
        ({"method": "qlora"}, "qlora"),
    ],
)
def test_every_method_gives_a_stock_checkpoint_that_learned(
    model_folder: Path, tmp_path: Path, changes: dict[str, Any], method: str
) -> None:
    if method == "qlora":
        pytest.importorskip("bitsandbytes", reason="qlora needs bitsandbytes: pip install 'hfsd[qlora]'")
    data = _data(tmp_path, ["the same answer"] * 16, ["x"] * 16)
    asked = _recipe(learning_rate=2e-2, num_train_epochs=2).model_copy(
        update=Train(**changes).model_dump(include=set(changes))
    )
    made = _run(model_folder, data, "sft", asked, tmp_path / "train")
    losses = [v for _, v in made.losses]
    out = tmp_path / "train" / "sft-d"
    assert len(losses) == 16 and losses[-1] < losses[0] - 0.3 and made.method == method
    assert (out / "adapter").is_dir() == (made.adapter is not None) == (method != "full")
    merged = models.load(out / "merged")  # refuses missing and unexpected keys
    names = {p.name for p in (out / "merged").iterdir()}
    assert {p.name for p in model_folder.iterdir()} == names and merged.config.use_cache
    if method == "full":
        assert made.trained_params == models.count_params(merged)


def test_after_cut_adapts_the_blocks_behind_the_cut_alone(model_folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = _data(tmp_path, ["a"] * 4, ["b"] * 4)
    made = {}
    for scope in ("all", "after-cut"):
        asked = Train(lora={"r": 2, "scope": scope}, sft={"per_device_train_batch_size": 2})
        made[scope] = _run(model_folder, data, "sft", asked, tmp_path / scope)
    tensors = load_file(tmp_path / "after-cut" / "sft-d" / "adapter" / "adapter_model.safetensors")
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in tensors} == {3, 4, 5}  # PLAN removes 3 and 4 of 8
    assert made["after-cut"].trained_params * 2 == made["all"].trained_params
    assert made["after-cut"].hyperparameters["lora_scope"] == "after-cut"
    end = PrunePlan(8, tuple(range(6)), "the last two")
    with pytest.raises(Refusal, match=r"after-cut: no block lies behind the cut; use scope: all"):
        asked = Train(lora={"scope": "after-cut"})
        train.run(_pruned(model_folder, end), data, Variant("sft", "d"), asked, tmp_path / "x" / "sft-d", _never)
    with pytest.raises(BadRequest, match="scope: after-cut says which blocks are adapted, and so does exclude_modules"):
        asked = Train(lora={"scope": "after-cut", "exclude_modules": ["q_proj"]})
        _run(model_folder, data, "sft", asked, tmp_path / "y")


def test_gradients_end_behind_the_cut_with_checkpointing_too(model_folder: Path, tmp_path: Path) -> None:
    from hfsd import schedule, settings, trainers

    tokenizer = models.load_tokenizer(model_folder)
    rows = schedule.read(_data(tmp_path, ["a"] * 4, ["b"] * 4), tokenizer, 100)
    asked = Train(lora={"r": 2, "scope": "after-cut"}, sft={"gradient_checkpointing": True})
    model = models.load(model_folder)
    trainer = trainers.build(
        settings.Job("sft", 0, asked, 3, tmp_path), model, tokenizer, rows.tables["reference"], _never
    )
    seen = []
    for block in models.decoder_blocks(model)[1]:
        block.register_full_backward_hook(lambda module, *_: seen.append(module.self_attn.layer_idx))
    trainer.train()
    assert set(seen) <= {3, 4, 5} and 4 in seen


@pytest.mark.parametrize("arm", ["sdd+kd", "on-policy"])
def test_arms_that_learn_from_the_original(
    model_folder: Path, tmp_path: Path, arm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedModel

    from hfsd import adapters

    teacher = tiny.llama(tmp_path / "teacher", seed=3)
    data = _data(tmp_path, ["a", "bb"] * 5, ["c d", "e"] * 5)
    asked = Train(
        lora={"r": 4},
        sft={"per_device_train_batch_size": 4, "learning_rate": 1e-2, "num_train_epochs": 2},
        on_policy={"max_completion_length": 6},
    )
    loaded: list[Any] = []  # weak references
    left: list[Any] = []

    def load() -> PreTrainedModel:
        model = models.load(teacher)
        loaded.append(weakref.ref(model))
        return model

    real = adapters.merge
    monkeypatch.setattr(adapters, "merge", lambda *a, **k: (left.append(loaded[0]()), real(*a, **k)))
    out = tmp_path / "train" / f"{arm}-d"
    made = train.run(_pruned(model_folder), data, Variant(arm, "d"), asked, out, load)
    assert made.steps == 5 and len(loaded) == 1 and all(v > 0 for _, v in made.losses)
    if arm == "sdd+kd":  # KL(original || pruned) on the rewrites falls
        assert made.losses[-1][1] < made.losses[0][1] and made.tokens == 2 * 5 * (len("c dE\n") + len("eE\n"))
    else:  # at most six tokens of each of 2 x 10 answers of its own
        assert 20 <= made.tokens <= 120
    sft = _run(model_folder, data, "sft", asked, tmp_path / "train")
    assert sft.fairness == made.fairness
    assert left[0] is None  # the original is let go before the adapter is merged


def test_an_experimental_trainer_that_moved_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    import trl

    monkeypatch.setitem(sys.modules, "trl.experimental.gkd", None)
    with pytest.raises(
        HfsdError, match=f"sdd\\+kd needs trl.experimental.gkd, which TRL {trl.__version__} does not have"
    ):
        train.check_fields(Train(kd={"beta": 0.5}))


def test_a_budget_of_tokens_trains_both_arms_on_as_many(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a" * 20] * 12, ["b" * 9] * 12)
    asked = _recipe().model_copy(update={"budget": "tokens"})
    sft, own = (_run(model_folder, data, arm, asked, tmp_path / "train") for arm in ARMS)
    assert sft.fairness == own.fairness and "completion tokens, to the nearest step" in sft.fairness["budget"]
    assert own.tokens == 12 * 11 and abs(sft.tokens - own.tokens) <= 22 / 2 and sft.steps == 3 < own.steps == 6


def test_seeds_change_the_start_and_the_order(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a", "b", "c", "d"], ["a", "b", "c", "d"])
    asked = _recipe().model_copy(update={"seeds": (0, 7)})
    made = [
        train.run(_pruned(model_folder), data, Variant("sft", "d", s), asked, tmp_path / f"sft-d-s{s}", _never)
        for s in (0, 7)
    ]
    assert all(made[0].fairness[k] != made[1].fairness[k] for k in ("adapter_start", "row_ids_in_order"))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"sft": {"packing": True}}, "train.sft.packing: arms whose texts differ in length would take another number"),
        ({"sft": {"max_length": None}}, "train.sft.max_length: give the tokens of the longest row"),
        ({"sft": {"save_total_limit": 1}}, "train.sft.save_total_limit: at 1, the last whole checkpoint is gone"),
        ({"sft": {"completion_only_loss": False}}, "train.sft.completion_only_loss: set by the run itself"),
        ({"sft": {"save_only_model": True}}, "train.sft.save_only_model: set by the run itself"),
        ({"sft": {"model_init_kwargs": {"dtype": "float16"}}}, "model_init_kwargs.dtype: only attn_implementation"),
        ({"kd": {"learning_rate": 1.0}}, "train.kd.learning_rate: shared by all arms; set it in train.sft"),
        ({"on_policy": {"max_steps": 3}}, "train.on_policy.max_steps: shared by all arms; set it in train.sft"),
        ({"on_policy": {"betta": 3}}, r"train.on_policy.betta: DistillationConfig has no such field \(did you mean"),
        ({"lora": {"init_lora_weights": "pissa"}}, "train.lora.init_lora_weights: 'pissa' rewrites the base's weights"),
        ({"lora": {"bias": "all"}}, "train.lora.bias: 'all' trains the base's biases"),
    ],
)
def test_fields_that_would_break_a_promise_are_told_before_the_work(asked: dict[str, Any], message: str) -> None:
    (fault,) = train.check_fields(Train(**asked))
    assert re.match(message, fault) or message in fault


def test_packing_is_the_default_where_attention_keeps_rows_apart(model_folder: Path, tmp_path: Path) -> None:
    from hfsd import settings

    model = models.load(model_folder)
    job = settings.Job("sft", 0, Train(budget="tokens"), 3, tmp_path)
    assert not settings.packs(job, model)
    model.config._attn_implementation_internal = "flash_attention_2"  # not to be run here: no GPU
    assert settings.packs(job, model)
    assert not settings.packs(settings.Job("sft", 0, Train(), 3, tmp_path), model)
    assert not settings.packs(settings.Job("sdd+kd", 0, Train(budget="tokens"), 3, tmp_path), model)


def test_memory_that_runs_out_is_one_line(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from trl import SFTTrainer

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(SFTTrainer, "train", out_of_memory)
    with pytest.raises(HfsdError, match="memory ran out with 2 rows at once; halve train.sft.per_device_train_batch"):
        _run(model_folder, _data(tmp_path, ["a"] * 2, ["b"] * 2), "sft", _recipe(), tmp_path / "train")


def test_killed_between_training_and_merging(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trl import SFTTrainer

    from hfsd import adapters

    data, asked = _data(tmp_path, ["a"] * 6, ["b"] * 6), _recipe(save_steps=2)
    whole = _run(model_folder, data, "sft", asked, tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(adapters, "merge", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            _run(model_folder, data, "sft", asked, tmp_path / "train")
    real, steps = SFTTrainer.training_step, []
    monkeypatch.setattr(SFTTrainer, "training_step", lambda *a, **k: (steps.append(1), real(*a, **k))[1])
    made = _run(model_folder, data, "sft", asked, tmp_path / "train")
    assert made.losses == whole.losses and len(steps) <= 1  # from the last checkpoint, at most its steps again
    assert (tmp_path / "train" / "sft-d" / "merged" / "model.safetensors").is_file()


def test_an_arm_begun_otherwise_is_not_gone_on_with(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a"] * 6, ["b"] * 6)
    _run(model_folder, data, "sft", _recipe(), tmp_path / "train")
    begun = tmp_path / "train" / "sft-d" / "work" / "fairness.json"
    kept = json.loads(begun.read_text())
    begun.write_text(json.dumps(kept | {"budget": "6 steps of 4 rows"}))
    with pytest.raises(Refusal, match=r"sft-d was begun with other budget \(another number of processes\?\)"):
        _run(model_folder, data, "sft", _recipe(), tmp_path / "train")


def test_a_merge_that_changes_the_logits_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from peft import LoraModel

    real = LoraModel.merge_and_unload

    def wrong(self: Any, *args: Any, **kwargs: Any) -> Any:
        merged = real(self, *args, **kwargs)
        with torch.no_grad():
            merged.get_input_embeddings().weight.mul_(1.1)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", wrong)
    with pytest.raises(HfsdError, match="merging changed the logits by"):
        _run(model_folder, _data(tmp_path, ["a"] * 2, ["b"] * 2), "sft", _recipe(), tmp_path / "train")
    assert not (tmp_path / "train" / "sft-d" / "merged").exists()


@pytest.mark.parametrize("method", ["lora", "full"])
def test_merged_weights_are_of_the_type_of_the_base(model_folder: Path, tmp_path: Path, method: str) -> None:
    import torch

    from hfsd import shards

    base = Path(shutil.copytree(model_folder, tmp_path / "half"))
    models.load(model_folder).to(torch.bfloat16).save_pretrained(base)
    asked = _recipe() if method == "lora" else Train(method="full", sft=_recipe().sft)
    _run(base, _data(tmp_path, ["a"] * 2, ["b"] * 2), "sft", asked, tmp_path / "train")
    merged = tmp_path / "train" / "sft-d" / "merged"
    assert {t.dtype for t in shards.read(merged)} == {"BF16"}
    assert json.loads((merged / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_really_trains_is_told_by_the_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    import torch

    from hfsd import trainers

    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "nccl")
    for name, told in (("FSDPModule", "FSDP2"), ("DeepSpeedEngine", "DeepSpeed"), ("LlamaForCausalLM", "no wrapper")):
        wrapped = type("Sharded", (type(name, (), {}),), {})()
        trainer = SimpleNamespace(args=SimpleNamespace(world_size=8), model_wrapped=wrapped)
        assert trainers.engine(trainer) == f"{told} over 8 processes (nccl)"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    alone = SimpleNamespace(args=SimpleNamespace(world_size=1), model_wrapped=object())
    assert trainers.engine(alone) == "1 process; FSDP was asked for, and accelerate does not run it here"


def test_gradients_are_checkpointed_where_memory_demands_it(model_folder: Path, tmp_path: Path) -> None:
    from hfsd import settings

    model = models.load(model_folder)
    few, many = (settings.Job("sft", 0, _recipe(), 3, tmp_path, longest=n) for n in (100, 10**9))
    assert not settings.arguments(few, model)["gradient_checkpointing"]
    assert settings.arguments(many, model)["gradient_checkpointing"]


def test_curves_of_other_trackers_outlive_the_work(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    _run(model_folder, _data(tmp_path, ["a"] * 2, ["b"] * 2), "sft", _recipe(), tmp_path / "run" / "train")
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "run" / "tensorboard" / "sft-d")


GEMMA = tiny.CHATML.replace(
    "{% for m in messages %}",
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}{% for m in messages %}",
)
THINKING = tiny.CHATML.replace("'<|im_start|>assistant\n' }}{% endif", "'<|im_start|>assistant\n<think>\n' }}{% endif")


@pytest.mark.parametrize("template", [GEMMA, THINKING], ids=["no system role", "a prompt that is no beginning"])
def test_templates_that_differ_with_and_without_an_answer(model_folder: Path, tmp_path: Path, template: str) -> None:
    from hfsd import schedule, settings, trainers

    base = _variation(model_folder, tmp_path / "model", template)
    tokenizer = models.load_tokenizer(base)
    rows = schedule.read(_data(tmp_path, ["ab", "cdé"], ["x", "yz"]), tokenizer, 300)
    job = settings.Job("sft", 0, _recipe(), 3, tmp_path / "work")
    trainer = trainers.build(job, models.load(base), tokenizer, rows.tables["reference"], _never)
    labels = trainer.train_dataset["labels"]
    assert rows.trained["reference"] == [sum(t != -100 for t in row) for row in labels]
    assert rows.trained["reference"] == [len(f"{text}E\n".encode()) for text in ("ab", "cdé")]


def test_an_empty_set_is_refused(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a"], ["b"])
    for path in data.values():
        import pyarrow.parquet as pq

        pq.write_table(pq.read_table(path).slice(0, 0), path)
    with pytest.raises(HfsdError, match="the training set is empty; make it again with --redo rewrite"):
        _run(model_folder, data, "sft", _recipe(), tmp_path / "train")


def _variation(source: Path, target: Path, template: str | None, pad: bool = True) -> Path:
    """The tiny model with another chat template, or none, and perhaps without a pad token."""
    shutil.copytree(source, target)
    (target / "chat_template.jinja").unlink()
    tokenizer = models.load_tokenizer(target)
    tokenizer.chat_template = template
    if not pad:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(target)
    return target


NO_SYSTEM = tiny.CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")


def test_a_template_that_drops_the_system_turn_gets_it_in_the_user_turn(model_folder: Path, tmp_path: Path) -> None:
    from hfsd import schedule

    base = _variation(model_folder, tmp_path / "model", NO_SYSTEM)
    tokenizer = models.load_tokenizer(base)
    data = _data(tmp_path, ["a"], ["b"])
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in data.values():
        (row,) = pq.read_table(path).to_pylist()
        row["prompt"] = [{"role": "system", "content": "Be brief."}, *row["prompt"]]
        pq.write_table(pa.Table.from_pylist([row]), path)
    (row,) = schedule.read(data, tokenizer, 200).tables["reference"]
    assert row["prompt"] == [{"role": "user", "content": "Be brief.\n\nquestion 0"}]
    assert _run(base, data, "sft", _recipe(), tmp_path / "train").steps == 1


def test_a_base_model_without_template_or_pad_token_is_trained_on_plain_text(
    model_folder: Path, tmp_path: Path
) -> None:
    base = _variation(model_folder, tmp_path / "model", None, pad=False)
    data = _data(tmp_path, ["abc"] * 2, ["x"] * 2)
    assert _run(base, data, "sft", _recipe(), tmp_path / "train").tokens == 2 * len("abcE")  # E: the end-of-text token
    with pytest.raises(Refusal, match=r"sdd\+kd needs a chat template, and the model's tokenizer has none"):
        _run(base, data, "sdd+kd", _recipe(), tmp_path / "train")


def test_counted_tokens_are_those_that_trl_trains(model_folder: Path, tmp_path: Path) -> None:
    from hfsd import schedule, settings, trainers

    tokenizer = models.load_tokenizer(model_folder)
    data = _data(tmp_path, ["a", "bcd", "ef gh"], ["uv", "w", "x\ny"])
    rows = schedule.read(data, tokenizer, 200)
    for text, table in rows.tables.items():
        job = settings.Job("sft", 0, _recipe(), 3, tmp_path / text)
        trainer = trainers.build(job, models.load(model_folder), tokenizer, table, _never)
        labels = trainer.train_dataset["labels"]
        assert rows.trained[text] == [sum(t != -100 for t in row) for row in labels]
        assert rows.lengths[text] == [len(row) for row in labels]


def test_the_merged_checkpoint_is_stock_and_equals_the_adapter(tiny_run: Path) -> None:
    import torch
    from peft import PeftModel

    arm = tiny_run / "train" / "sft-gsm-symbolic"
    base = models.load(tiny_run / "prune" / "checkpoint")
    merged = models.load(arm / "merged")
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        untrained = base(ids).logits
        tuned = PeftModel.from_pretrained(base, arm / "adapter")(ids).logits
        assert torch.allclose(merged(ids).logits, tuned, atol=1e-4) and not torch.allclose(untrained, tuned, atol=1e-4)
    assert merged.config.use_cache and not (arm / "adapter" / "README.md").exists()
    report = json.loads((arm / "train.json").read_text())
    assert report["trained_params"] == sum(p.numel() for n, p in base.named_parameters() if "lora_" in n)


def test_an_adapter_that_does_not_fit_is_refused(tiny_run: Path, model_folder: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(tiny_run / "train" / "sft-gsm-symbolic" / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 7}))
    with pytest.raises(BadRequest, match=r"train.adapter_from.sft: .* does not fit"):
        train.adopt(adapter, _pruned(model_folder), Variant("sft", "d"), tmp_path / "out")
    with pytest.raises(BadRequest, match=r"holds no adapter_config.json"):
        train.adopt(tmp_path, _pruned(model_folder), Variant("sft", "d"), tmp_path / "out")
