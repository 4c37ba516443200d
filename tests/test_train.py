"""Arms that share everything but the text; rows that are too long; wrong settings; adapters and merges."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hfsd import models, train
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.recipe import Train
from hfsd.records import TRAINED_ARMS as ARMS
from hfsd.records import Variant

WEIGHTS = {"model.safetensors": "aa"}


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
    return {arm: _parquet(folder / f"{arm}.parquet", t, **more) for arm, t in zip(ARMS, (sft, own), strict=True)}


def _recipe(**sft: object) -> Train:
    return Train(lora={"r": 2}, sft={"per_device_train_batch_size": 2, **sft})


def _run(base: Path, data: dict[str, Path], arm: str, asked: Train, root: Path) -> train.TrainReport:
    return train.run(base, data, Variant(arm, "d"), asked, root / f"{arm}-d", WEIGHTS)


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
        )
    assert not (tmp_path / "train" / "self-distilled-d" / "adapter").exists()


def test_other_rows_or_another_order_are_refused(model_folder: Path, tmp_path: Path) -> None:
    data = _data(tmp_path, ["a", "b"], ["a", "b"])
    _parquet(data["sft"], ["a", "b"], ids=["r1", "r0"])
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
    assert report["lora_params"] == sum(p.numel() for n, p in base.named_parameters() if "lora_" in n)


def test_an_adapter_that_does_not_fit_is_refused(tiny_run: Path, model_folder: Path, tmp_path: Path) -> None:
    adapter = Path(shutil.copytree(tiny_run / "train" / "sft-gsm-symbolic" / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 7}))
    with pytest.raises(BadRequest, match=r"train.adapter_from.sft: .* does not fit"):
        train.adopt(adapter, model_folder, Variant("sft", "d"), tmp_path / "out")
    with pytest.raises(BadRequest, match=r"holds no adapter_config.json"):
        train.adopt(tmp_path, model_folder, Variant("sft", "d"), tmp_path / "out")
