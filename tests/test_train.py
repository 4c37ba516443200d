"""Arms that share everything but the text; rows that are too long; wrong settings; adapters and merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hfsd import models, train
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.recipe import Train
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


def _never() -> Any:
    pytest.fail("this arm needs no teacher")


def _recipe(**sft: object) -> Train:
    return Train(lora={"r": 2}, sft={"per_device_train_batch_size": 2, **sft})


def _run(base: Path, data: dict[str, Path], arm: str, asked: Train, root: Path) -> train.TrainReport:
    return train.run(base, data, Variant(arm, "d"), asked, root / f"{arm}-d", WEIGHTS, PLAN, lambda: models.load(base))


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
        train.run(
            model_folder,
            data,
            Variant("self-distilled", "d"),
            _recipe(),
            tmp_path / "train" / "self-distilled-d",
            {"x": "bb"},
            PLAN,
            lambda: models.load(model_folder),
        )
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
        train.run(model_folder, data, Variant("sft", "d"), asked, tmp_path / "x" / "sft-d", WEIGHTS, end, _never)
    with pytest.raises(BadRequest, match="scope: after-cut says which blocks are adapted, and so does exclude_modules"):
        asked = Train(lora={"scope": "after-cut", "exclude_modules": ["q_proj"]})
        _run(model_folder, data, "sft", asked, tmp_path / "y")


def test_gradients_end_behind_the_cut_with_checkpointing_too(model_folder: Path, tmp_path: Path) -> None:
    from hfsd import schedule, trainers

    tokenizer = models.load_tokenizer(model_folder)
    rows = schedule.read(_data(tmp_path, ["a"] * 4, ["b"] * 4), tokenizer, 100)
    asked = Train(lora={"r": 2, "scope": "after-cut"}, sft={"gradient_checkpointing": True})
    model = models.load(model_folder)
    trainer = trainers.build(
        trainers.Job("sft", 0, asked, 3, tmp_path), model, tokenizer, rows.tables["reference"], _never
    )
    seen = []
    for block in models.decoder_blocks(model)[1]:
        block.register_full_backward_hook(lambda module, *_: seen.append(module.self_attn.layer_idx))
    trainer.train()
    assert set(seen) <= {3, 4, 5} and 4 in seen


@pytest.mark.parametrize("arm", ["sdd+kd", "on-policy"])
def test_arms_that_learn_from_the_original(model_folder: Path, tmp_path: Path, arm: str) -> None:
    import gc

    from transformers import PreTrainedModel

    teacher = tiny.llama(tmp_path / "teacher", seed=3)
    data = _data(tmp_path, ["a", "bb"] * 5, ["c d", "e"] * 5)
    asked = Train(
        lora={"r": 4},
        sft={"per_device_train_batch_size": 4, "learning_rate": 1e-2, "num_train_epochs": 2},
        on_policy={"max_completion_length": 6},
    )
    loaded = []

    def load() -> PreTrainedModel:
        loaded.append(models.load(teacher))
        return loaded[-1]

    out = tmp_path / "train" / f"{arm}-d"
    made = train.run(model_folder, data, Variant(arm, "d"), asked, out, WEIGHTS, PLAN, load)
    assert made.steps == 5 and len(loaded) == 1 and all(v > 0 for _, v in made.losses)
    if arm == "sdd+kd":  # KL(original || pruned) on the rewrites falls
        assert made.losses[-1][1] < made.losses[0][1] and made.tokens == 2 * 5 * (len("c dE\n") + len("eE\n"))
    else:  # at most six tokens of each of 2 x 10 answers of its own
        assert 20 <= made.tokens <= 120
    sft = _run(model_folder, data, "sft", asked, tmp_path / "train")
    assert sft.fairness == made.fairness
    reference = __import__("weakref").ref(loaded.pop())
    gc.collect()
    assert reference() is None  # nothing but the caller's hold is left


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
    assert sft.fairness == own.fairness and "completion tokens, to the nearest row" in sft.fairness["budget"]
    assert own.tokens == 12 * 11 and abs(sft.tokens - own.tokens) <= 22 / 2 and sft.steps == 3 < own.steps == 6


def test_seeds_change_the_start_and_the_order(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a", "b", "c", "d"], ["a", "b", "c", "d"])
    asked = _recipe().model_copy(update={"seeds": (0, 7)})
    made = [
        train.run(model_folder, data, Variant("sft", "d", s), asked, tmp_path / f"sft-d-s{s}", WEIGHTS, PLAN, _never)
        for s in (0, 7)
    ]
    assert all(made[0].fairness[k] != made[1].fairness[k] for k in ("adapter_start", "row_ids_in_order"))


def test_packing_needs_a_budget_of_tokens(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a"] * 4, ["b"] * 4)
    with pytest.raises(Refusal, match="arms whose texts differ in length would take another number of steps"):
        _run(model_folder, data, "sft", _recipe(packing=True), tmp_path / "train")


def test_packing_is_the_default_where_attention_keeps_rows_apart(model_folder: Path, tmp_path: Path) -> None:
    from hfsd import trainers

    model = models.load(model_folder)
    job = trainers.Job("sft", 0, Train(budget="tokens"), 3, tmp_path)
    assert not trainers.packs(job, model)
    model.config._attn_implementation_internal = "flash_attention_2"  # not to be run here: no GPU
    assert trainers.packs(job, model)
    assert not trainers.packs(trainers.Job("sft", 0, Train(), 3, tmp_path), model)
    assert not trainers.packs(trainers.Job("sdd+kd", 0, Train(budget="tokens"), 3, tmp_path), model)


def test_memory_that_runs_out_is_one_line(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from trl import SFTTrainer

    def out_of_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(SFTTrainer, "train", out_of_memory)
    with pytest.raises(HfsdError, match="memory ran out with 2 rows at once; halve train.sft.per_device_train_batch"):
        _run(model_folder, _data(tmp_path, ["a"] * 2, ["b"] * 2), "sft", _recipe(), tmp_path / "train")


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
    from hfsd import schedule, trainers

    tokenizer = models.load_tokenizer(model_folder)
    data = _data(tmp_path, ["a", "bcd", "ef gh"], ["uv", "w", "x\ny"])
    rows = schedule.read(data, tokenizer, 200)
    for text, table in rows.tables.items():
        job = trainers.Job("sft", 0, _recipe(), 3, tmp_path / text)
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
        train.adopt(adapter, model_folder, Variant("sft", "d"), tmp_path / "out")
    with pytest.raises(BadRequest, match=r"holds no adapter_config.json"):
        train.adopt(tmp_path, model_folder, Variant("sft", "d"), tmp_path / "out")
