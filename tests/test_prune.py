"""Pruned checkpoints: bytes, self-check, provenance, corrupt sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hfsd import models, prune, surgery
from hfsd.errors import BadRequest, HfsdError
from hfsd.records import ModelRef, Provenance, load
from tests import tiny

REF = ModelRef("org/model", "c0ffee")


def _cut(source: Path, start: int, stop: int, out: Path, check: str = "auto") -> prune.Checkpoint:
    return prune.run(source, REF, surgery.plan_removing(models.depth(source), start, stop, "test"), out, check)


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 4), (4, 6)])
def test_a_cut_is_a_stock_checkpoint_that_equals_the_original_without_its_blocks(
    model_folder: Path, tmp_path: Path, start: int, stop: int
) -> None:
    from safetensors import safe_open

    made = _cut(model_folder, start, stop, tmp_path / "cut")
    assert [(c.level, c.result) for c in made.checks] == [("structure", "passed"), ("numeric", "passed")]
    kept = made.plan.kept
    with (
        safe_open(tmp_path / "cut" / "model.safetensors", "pt") as new,
        safe_open(model_folder / "model.safetensors", "pt") as old,
    ):
        assert new.metadata() == {"format": "pt"}
        for name in new.keys():  # noqa: SIM118 - it is no dictionary
            parts = name.split(".")
            if parts[1] == "layers":
                parts[2] = str(kept[int(parts[2])])
            assert (new.get_tensor(name) == old.get_tensor(".".join(parts))).all()
    assert made.params == models.count_params(models.load(tmp_path / "cut"))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (model_folder / name).read_bytes()


def test_untied_and_sharded_sources(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny.llama(tmp_path / "untied", tied=False)
    AutoModelForCausalLM.from_pretrained(source).save_pretrained(tmp_path / "sharded", max_shard_size="40KB")
    (source / "tokenizer.json").rename(tmp_path / "sharded" / "tokenizer.json")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    made = _cut(tmp_path / "sharded", 1, 4, tmp_path / "cut")
    assert made.checks[1].result == "passed" and list(made.sha256) == ["model.safetensors"]


def test_cutting_a_cut_keeps_the_first_originals_numbers(model_folder: Path, tmp_path: Path) -> None:
    _cut(model_folder, 1, 3, tmp_path / "once")
    _cut(tmp_path / "once", 2, 3, tmp_path / "twice")
    found = load(Provenance, tmp_path / "twice" / "hfsd.json")
    assert (found.original, found.n_layers, found.kept) == (REF, 6, (0, 3, 5))


def test_flops_and_parameters_of_the_cut(model_folder: Path, tmp_path: Path) -> None:
    made = _cut(model_folder, 2, 4, tmp_path / "cut", "structure")
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32  # q, o; k, v; gate, up, down
    assert made.matmul_flop_cut == pytest.approx(2 * block / (6 * block + 32 * tiny.VOCABULARY))
    assert made.original_params - made.params == 2 * (block + 2 * 32)
    assert made.checks[1].result == "not run: prune.check is structure"


def test_a_failed_self_check_leaves_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgery, "cut_config", lambda config, kept, n: {**config, "num_hidden_layers": len(kept) + 1})
    with pytest.raises(HfsdError, match="does not fit its class LlamaForCausalLM: missing"):
        _cut(model_folder, 2, 4, tmp_path / "out" / "cut")
    assert not list((tmp_path / "out").iterdir())


def test_the_numeric_check_can_fail(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = surgery.cut_name

    def wrong(name: str, prefix: str, kept: tuple[int, ...]) -> str | None:
        return real(name, prefix, (0, 1, 2, 5))  # bytes of other blocks than the plan keeps

    monkeypatch.setattr(surgery, "cut_name", wrong)
    with pytest.raises(HfsdError, match="logits of the cut model are off by"):
        _cut(model_folder, 2, 4, tmp_path / "cut")


def _damaged(model_folder: Path, folder: Path) -> Path:
    return Path(shutil.copytree(model_folder, folder))


def test_corrupt_sources_give_one_line_and_nothing(model_folder: Path, tmp_path: Path) -> None:
    cut_short = _damaged(model_folder, tmp_path / "short") / "model.safetensors"
    cut_short.write_bytes(cut_short.read_bytes()[:-10])
    garbage = _damaged(model_folder, tmp_path / "garbage") / "model.safetensors"
    garbage.write_bytes(b"\xff" * 100)
    twice = _damaged(model_folder, tmp_path / "twice")
    shutil.copy(twice / "model.safetensors", twice / "model-2.safetensors")
    absent = _damaged(model_folder, tmp_path / "absent")
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (absent / "model.safetensors.index.json").write_text(json.dumps(index))
    for folder, message in (
        ("short", "corrupt or truncated"),
        ("garbage", "corrupt or truncated"),
        ("twice", "is in more than one file"),
        ("absent", "model-00001-of-00002.safetensors is missing"),
    ):
        with pytest.raises(HfsdError, match=message) as caught:
            _cut(tmp_path / folder, 1, 2, tmp_path / "out" / "cut")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_full_disk_is_told_before_the_start(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(HfsdError, match=r"0\.0 GB free, the cut checkpoint needs"):
        _cut(model_folder, 1, 2, tmp_path / "out" / "cut")


def test_a_wrong_depth_names_what_was_found(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"one stack of 5 blocks .* model.layers \(6 blocks\)"):
        prune.run(model_folder, REF, surgery.plan_removing(5, 1, 2, ""), tmp_path / "cut")
