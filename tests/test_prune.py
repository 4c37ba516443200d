"""Pruned checkpoints: bytes, self-check, provenance, corrupt sources, faults while writing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from hfsd import models, prune, shards, surgery
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.plain import load
from hfsd.records import ModelRef, Provenance, PrunePlan
from tests import tiny

REF = ModelRef("org/model", "c0ffee")


def _cut(source: Path, start: int, stop: int, out: Path, check: str = "auto", **options) -> prune.Checkpoint:
    return prune.run(
        source, REF, surgery.plan_removing(models.depth(source), start, stop, "test"), out, check, **options
    )


def _tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name -> dtype, shape and bytes, by reading the files as the format says."""
    found = {}
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        assert header.pop("__metadata__")["format"] == "pt" and length % 8 == 0
        for name, info in header.items():
            start, stop = (8 + length + at for at in info["data_offsets"])
            found[name] = (info["dtype"], tuple(info["shape"]), raw[start:stop])
    return found


def _expected(folder: Path, kept: tuple[int, ...]) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    found = {}
    for name, tensor in _tensors(folder).items():
        parts = name.split(".")
        if parts[1] == "layers":
            if int(parts[2]) not in kept:
                continue
            parts[2] = str(kept.index(int(parts[2])))
        found[".".join(parts)] = tensor
    return found


def _sharded(tmp_path: Path, dtype: str = "float32", size: str = "40KB") -> Path:
    import torch
    from transformers import AutoModelForCausalLM

    source = tiny.llama(tmp_path / "whole", tied=False)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "sharded", max_shard_size=size)
    return tmp_path / "sharded"


@pytest.mark.parametrize(("start", "stop"), [(0, 2), (2, 4), (4, 6)])
def test_a_cut_is_a_stock_checkpoint_that_equals_the_original_without_its_blocks(
    model_folder: Path, tmp_path: Path, start: int, stop: int
) -> None:
    made = _cut(model_folder, start, stop, tmp_path / "cut")
    assert [(c.level, c.result) for c in made.checks] == [("structure", "passed"), ("numeric", "passed")]
    assert _tensors(tmp_path / "cut") == _expected(model_folder, made.plan.kept)
    assert made.params == models.count_params(models.load(tmp_path / "cut"))
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (model_folder / name).read_bytes()
    assert set(made.seconds) == {"copy", "structure", "numeric", "hash"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_shards_are_repacked_to_the_size_asked_for(tmp_path: Path, dtype: str) -> None:
    source = _sharded(tmp_path, dtype)
    assert len(list(source.glob("*.safetensors"))) > 1
    for limit, many in ((30_000, True), (10**9, False)):
        made = _cut(source, 1, 4, tmp_path / f"cut{limit}", shard_bytes=limit)
        assert made.checks[1].result == "passed"
        out = tmp_path / f"cut{limit}"
        assert _tensors(out) == _expected(source, (0, 4, 5))
        files = sorted(p.name for p in out.glob("*.safetensors"))
        assert sorted(made.sha256) == files and (len(files) > 1) == many
        if many:
            index = json.loads((out / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == sum(len(t[2]) for t in _tensors(out).values())
            for file in files:
                held = [n for n, f in index["weight_map"].items() if f == file]
                sizes = [len(_tensors(out)[n][2]) for n in held]
                assert len(held) == 1 or sum(sizes) <= limit
        else:
            assert files == ["model.safetensors"]


def test_no_block_removed_is_a_copy(model_folder: Path, tmp_path: Path) -> None:
    made = prune.run(model_folder, REF, surgery.plan_keeping(6, range(6), "a copy"), tmp_path / "copy")
    assert _tensors(tmp_path / "copy") == _tensors(model_folder)
    assert made.checks[1].result == "passed" and made.matmul_flop_cut == 0
    assert load(Provenance, tmp_path / "copy" / "hfsd.json") == Provenance(REF, 6, tuple(range(6)), [])
    old, new = (json.loads((f / "config.json").read_text()) for f in (model_folder, tmp_path / "copy"))
    assert new == old


def test_cutting_a_cut_adds_to_its_history(model_folder: Path, tmp_path: Path) -> None:
    scored = PrunePlan(6, (0, 3, 4, 5), "least loss", {"loss": 2.5})
    prune.run(model_folder, REF, scored, tmp_path / "once")
    _cut(tmp_path / "once", 2, 3, tmp_path / "twice")
    found = load(Provenance, tmp_path / "twice" / "hfsd.json")
    assert (found.original, found.n_layers, found.kept) == (REF, 6, (0, 3, 5))
    assert [(c.removed, c.why, c.scores) for c in found.cuts] == [
        ((1, 2), "least loss", {"loss": 2.5}),
        ((4,), "test", {}),
    ]
    assert _tensors(tmp_path / "twice") == _expected(model_folder, (0, 3, 5))
    adopted = prune.adopt(model_folder, tmp_path / "twice", tmp_path / "adopted")
    assert adopted.plan.kept == (0, 3, 5) and adopted.checks[1].result == "passed"
    assert adopted.plan.why == "least loss; test"


def test_flops_and_parameters_of_the_cut(model_folder: Path, tmp_path: Path) -> None:
    made = _cut(model_folder, 2, 4, tmp_path / "cut", "structure")
    block = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32  # q, o; k, v; gate, up, down
    assert made.matmul_flop_cut == pytest.approx(2 * block / (6 * block + 32 * tiny.VOCABULARY))
    assert made.original_params - made.params == 2 * (block + 2 * 32)
    assert made.checks[1].result == "not run: check is structure"


def test_a_failed_self_check_leaves_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surgery, "cut_config", lambda config, kept, n: {**config, "num_hidden_layers": len(kept) + 1})
    with pytest.raises(HfsdError, match="does not fit its class LlamaForCausalLM: missing"):
        _cut(model_folder, 2, 4, tmp_path / "out" / "cut")
    assert not (tmp_path / "out").exists()


def test_the_numeric_check_can_fail(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = surgery.cut_name

    def wrong(name: str, prefix: str, plan: PrunePlan) -> str | None:
        return real(name, prefix, PrunePlan(6, (0, 1, 2, 5), ""))  # bytes of other blocks than the plan keeps

    monkeypatch.setattr(surgery, "cut_name", wrong)
    with pytest.raises(HfsdError, match="logits of the cut llama are off by"):
        _cut(model_folder, 2, 4, tmp_path / "cut")
    assert not (tmp_path / "cut").exists()


def _rewrite_header(file: Path, change) -> None:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(change(json.loads(raw[8 : 8 + length]))).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


def _truncated(folder: Path) -> None:
    file = next(iter(sorted(folder.glob("*.safetensors"))))
    file.write_bytes(file.read_bytes()[:-10])


def _garbage(folder: Path) -> None:
    next(iter(sorted(folder.glob("*.safetensors")))).write_bytes(b"\xff" * 100)


def _empty(folder: Path) -> None:
    next(iter(sorted(folder.glob("*.safetensors")))).write_bytes(b"")


def _out_of_place(folder: Path) -> None:
    def change(header: dict) -> dict:
        name = next(n for n in header if n != "__metadata__")
        header[name]["data_offsets"][1] += 10**9
        return header

    _rewrite_header(next(iter(sorted(folder.glob("*.safetensors")))), change)


def _missing_shard(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[1].unlink()


def _change_index(folder: Path, change) -> None:
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index["weight_map"], sorted(p.name for p in folder.glob("*.safetensors")))
    file.write_text(json.dumps(index))


def _absent_tensor(folder: Path) -> None:
    _change_index(folder, lambda where, files: where.update({"model.layers.2.mlp.fourth.weight": files[0]}))


def _duplicate(folder: Path) -> None:
    first = sorted(folder.glob("*.safetensors"))[0]
    shutil.copy(first, folder / "model-again.safetensors")
    _change_index(folder, lambda where, files: where.update({"copy.weight": "model-again.safetensors"}))


def _outside(folder: Path) -> None:
    _change_index(folder, lambda where, files: where.update({"lm_head.weight": "../whole/model.safetensors"}))


def _no_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[]")


def _pickle(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncated, r"model-00001-of-\d+.safetensors is corrupt or truncated"),
        (_garbage, r"model-00001-of-\d+.safetensors is corrupt or truncated"),
        (_empty, r"model-00001-of-\d+.safetensors is corrupt or truncated"),
        (_out_of_place, r"model-00001-of-\d+.safetensors is corrupt or truncated"),
        (_missing_shard, r"model-00002-of-\d+.safetensors is missing"),
        (_absent_tensor, r"the index names model.layers.2.mlp.fourth.weight in \S+, which does not hold it"),
        (_duplicate, r"tensor \S+ is in model-00001-of-\d+.safetensors and in model-again.safetensors"),
        (_outside, r"names the file '../whole/model.safetensors', which is outside of the folder"),
        (_no_index, r"index.json is no index of tensors"),
        (_pickle, r"pytorch_model.bin.*save_pretrained"),
    ],
)
def test_damaged_sources_give_one_line_and_nothing(tmp_path: Path, damage, message: str) -> None:
    source = _sharded(tmp_path)
    damage(source)
    with pytest.raises(HfsdError, match=message) as caught:
        _cut(source, 1, 2, tmp_path / "out" / "cut")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_belongs_to_the_uncut_model_stays_behind(model_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model_folder, tmp_path / "source"))
    for name in ("tf_model.h5", "model.onnx", "pytorch_model.bin", "README.md", "custom_code.py", "vocab.txt"):
        (source / name).write_text("x")
    _cut(source, 1, 2, tmp_path / "cut", "structure")
    assert {"custom_code.py", "vocab.txt", "tokenizer.json"} <= {p.name for p in (tmp_path / "cut").iterdir()}
    assert not {p.name for p in (tmp_path / "cut").iterdir()} & {
        "tf_model.h5",
        "model.onnx",
        "pytorch_model.bin",
        "README.md",
    }


def test_a_damaged_history_is_told(model_folder: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(model_folder, tmp_path / "source"))
    for damaged in ("{", "[]", '{"kept": 3}'):
        (source / "hfsd.json").write_text(damaged)
        with pytest.raises(BadRequest, match="hfsd.json is damaged"):
            _cut(source, 1, 2, tmp_path / "cut", "structure")


def test_a_full_disk_is_told_before_the_start(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(HfsdError, match=r"0\.0 GB free, the cut checkpoint needs"):
        _cut(model_folder, 1, 2, tmp_path / "out" / "cut")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_while_writing_leaves_nothing(model_folder: Path, tmp_path: Path) -> None:
    """The kernel itself refuses to let a file grow past 100 kB, in a process of its own."""
    limited = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from hfsd.cli import main; sys.argv[0] = 'hfsd'; main()"
    )
    arguments = ["prune", str(model_folder), "--remove", "1:2", "--out", str(tmp_path / "out" / "cut")]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "File too large" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def by_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny checkpoints take the way of large ones: from the second page on, the kernel copies."""
    monkeypatch.setattr(shards, "CHUNK", shards.PAGE)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.ENOSPC])
@pytest.mark.usefixtures("by_kernel")
def test_a_disk_that_cannot_be_written_leaves_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def fails(*_: object, **__: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", fails)
    with pytest.raises(HfsdError, match=f"cannot write .*{os.strerror(code)}"):
        _cut(model_folder, 1, 2, tmp_path / "out" / "cut")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("code", sorted(shards.NO_RANGE_COPY))
@pytest.mark.usefixtures("by_kernel")
def test_without_a_range_copy_plain_reads_give_the_same_bytes(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    asked = []

    def refuses(*_: object, **__: object) -> int:
        asked.append(code)
        raise OSError(code, os.strerror(code))

    _cut(model_folder, 1, 2, tmp_path / "one", "structure")
    monkeypatch.setattr(os, "copy_file_range", refuses)
    _cut(model_folder, 1, 2, tmp_path / "other", "structure")
    assert asked
    assert (tmp_path / "one" / shards.WEIGHTS).read_bytes() == (tmp_path / "other" / shards.WEIGHTS).read_bytes()


@pytest.mark.usefixtures("by_kernel")
def test_a_range_copy_that_moves_less_than_asked_goes_on(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, moved = os.copy_file_range, []

    def less(source: int, target: int, count: int, offset_src: int) -> int:
        moved.append(real(source, target, min(count, 777), offset_src))
        return moved[-1]

    monkeypatch.setattr(os, "copy_file_range", less)
    _cut(model_folder, 1, 2, tmp_path / "cut", "structure")
    assert set(moved) >= {777}
    assert _tensors(tmp_path / "cut") == _expected(model_folder, (0, 2, 3, 4, 5))


@pytest.mark.usefixtures("by_kernel")
def test_a_source_that_shrinks_while_it_is_copied_leaves_nothing(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "copy_file_range", lambda *_, **__: 0)
    with pytest.raises(HfsdError, match="model.safetensors ended .* bytes early"):
        _cut(model_folder, 1, 2, tmp_path / "out" / "cut")
    assert not (tmp_path / "out").exists()


def test_a_wrong_depth_names_what_was_found(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="the plan is for 5 blocks, and .*tiny-llama has 6"):
        prune.run(model_folder, REF, surgery.plan_removing(5, 1, 2, ""), tmp_path / "cut")
    source = Path(shutil.copytree(model_folder, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 5}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadRequest, match=r"one stack of 5 blocks .* model.layers \(6 blocks\)"):
        prune.run(source, REF, surgery.plan_removing(5, 1, 2, ""), tmp_path / "cut")


def test_more_blocks_than_there_are(model_folder: Path) -> None:
    with pytest.raises(BadRequest, match=r"blocks \[4, 9\) are not within \[0, 6\)"):
        surgery.plan_removing(models.depth(model_folder), 4, 9, "")


def test_a_model_that_does_not_fit_is_checked_by_structure(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=1000))
    made = _cut(model_folder, 1, 2, tmp_path / "cut")
    assert made.checks[0].result == "passed" and made.checks[1].result.startswith("not run: the original in float32")
    monkeypatch.setattr(surgery, "TESTED", frozenset())
    for check in ("auto", "structure"):
        with pytest.raises(Refusal, match="llama is not among the tested architectures and needs check numeric, and"):
            _cut(model_folder, 1, 2, tmp_path / "other", check)
    assert _cut(model_folder, 1, 2, tmp_path / "other", "numeric").checks[1].result == "passed"
