"""Pruning against `cp`, `sha256sum` and mergekit's passthrough merge, on the same 2 GB checkpoint.

mergekit lives in an environment of its own, whose Python $HFSD_BENCH_MERGEKIT names (pip install mergekit==0.1.5).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from hfsd import prune, shards, surgery
from hfsd.records import ModelRef
from tests.bench.conftest import Table, in_turn, peak

pytestmark = pytest.mark.bench
N_LAYERS, START, STOP = 19, 8, 12
PLAN = surgery.plan_removing(N_LAYERS, START, STOP, "bench")
OURS = """
import sys
from pathlib import Path
def prepare():
    import torch, transformers
    from transformers import LlamaForCausalLM
    import hfsd.prune
def work():
    from hfsd import prune, surgery
    from hfsd.records import ModelRef
    source, cut, out = sys.argv[1:]
    plan = surgery.plan_removing(*map(int, cut.split(":")), "bench")
    prune.run(Path(source), ModelRef("m"), plan, Path(out), "structure")
"""
MERGEKIT = """
import sys
def prepare():
    import mergekit.merge, mergekit.config, transformers
def work():
    from mergekit.merge import run_merge
    from mergekit.config import MergeConfiguration
    from mergekit.options import MergeOptions
    source, cut, out = sys.argv[1:]
    n_layers, start, stop = map(int, cut.split(":"))
    slices = [{"sources": [{"model": source, "layer_range": r}]} for r in ([0, start], [stop, n_layers])]
    config = {"merge_method": "passthrough", "dtype": "float32", "slices": slices}
    run_merge(MergeConfiguration.model_validate(config), out, MergeOptions())
"""


def _fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    os.sync()  # what the work before it left to be written is not this one's
    return folder


def _digests(folder: Path) -> dict[str, str]:
    """Tensor -> sha256 of its bytes, wherever it lies."""
    found = {}
    for tensor in shards.read(folder):
        with open(tensor.file, "rb") as handle:
            handle.seek(tensor.start)
            found[tensor.name] = hashlib.sha256(handle.read(tensor.bytes)).hexdigest()
    return found


def test_prune_against_cp_and_sha256sum(two_gigabytes: Path, tmp_path: Path, table: Table) -> None:
    cut, copied = tmp_path / "cut", tmp_path / "copied"
    made = prune.run(two_gigabytes, ModelRef("m"), PLAN, cut, "structure")  # warms interpreter and page cache
    files = sorted(str(p) for p in cut.glob("*.safetensors"))
    kept = sum(os.path.getsize(f) for f in files)
    least = {"copy": float("inf"), "structure": float("inf"), "hash": float("inf"), "cp": float("inf")}
    for _ in range(5):
        made = prune.run(two_gigabytes, ModelRef("m"), PLAN, _fresh(tmp_path / "again"), "structure")
        _fresh(copied).mkdir()
        cp = in_turn(1, cp=lambda: subprocess.run(["cp", *files, str(copied)], check=True))
        least = {k: min(v, (made.seconds | cp)[k]) for k, v in least.items()}
    least |= in_turn(2, sha256sum=lambda: subprocess.run(["sha256sum", *files], check=True, capture_output=True))
    ours = least["copy"] + least["structure"]
    rows = [("what", "seconds", "GB/s")] + [(k, f"{s:.2f}", f"{kept / s / 1e9:.2f}") for k, s in least.items()]
    rows += [("(copy + structure) / cp", f"{ours / least['cp']:.2f} x", "")]
    rows += [("hash / sha256sum", f"{least['hash'] / least['sha256sum']:.2f} x", "")]
    table(f"prune: {kept / 1e9:.2f} GB kept of a 2 GB sharded checkpoint, least of 5", rows)
    assert ours <= 1.3 * least["cp"]
    assert least["hash"] <= 1.1 * least["sha256sum"]


def test_peak_memory(two_gigabytes: Path, tmp_path: Path, table: Table) -> None:
    found = peak(OURS, str(two_gigabytes), f"{N_LAYERS}:{START}:{STOP}", str(tmp_path / "cut"))
    rows = [("above the interpreter, MB", f"{found['above']:.0f}"), ("whole process, MB", f"{found['whole']:.0f}")]
    table("prune: peak resident memory on the 2 GB checkpoint", rows)
    assert found["above"] < 300


def test_prune_against_mergekit(demo_folder: Path, tmp_path: Path, table: Table) -> None:
    """Their command takes seconds to start, as ours does: both parts are shown, and what 8 x is measured against."""
    python = os.environ.get("HFSD_BENCH_MERGEKIT")
    if not python:
        pytest.skip("$HFSD_BENCH_MERGEKIT names no Python with mergekit 0.1.5")
    least: dict[str, dict[str, float]] = {}
    warm = float("inf")
    for _ in range(3):
        ours = peak(OURS, str(demo_folder), "30:12:18", str(_fresh(tmp_path / "ours")))
        theirs = peak(MERGEKIT, str(demo_folder), "30:12:18", str(_fresh(tmp_path / "theirs")), python=python)
        for name, found in (("hfsd", ours), ("mergekit", theirs)):
            least[name] = {k: min(v, least.get(name, found)[k]) for k, v in found.items()}
        plan = surgery.plan_removing(30, 12, 18, "bench")
        made = prune.run(demo_folder, ModelRef("m"), plan, _fresh(tmp_path / "warm"), "structure")
        warm = min(warm, made.seconds["copy"] + made.seconds["structure"])
    rows = [("what", "seconds", "MB")]
    rows += [("hfsd, copy + structure, warm", f"{warm:.2f}", "")]
    for name, found in least.items():
        rows.append((f"{name}, first call, imports done", f"{found['seconds']:.2f}", f"{found['above']:.0f} above"))
        rows.append((f"{name}, whole process", f"{found['process']:.2f}", f"{found['whole']:.0f}"))
    theirs, ours = least["mergekit"], least["hfsd"]
    rows.append(("mergekit's process / our warm call", f"{theirs['process'] / warm:.1f} x", ""))
    rows.append(("mergekit's first call / our warm call", f"{theirs['seconds'] / warm:.1f} x", ""))
    rows.append(("whole process / whole process", f"{theirs['process'] / ours['process']:.1f} x", ""))
    rows.append(("memory above the interpreter", "", f"{theirs['above'] / ours['above']:.1f} x"))
    table("mergekit's passthrough merge of SmolLM2-135M less 6 blocks, float32, least of 3", rows)
    assert _digests(tmp_path / "ours") == _digests(tmp_path / "theirs")
    assert theirs["process"] >= 8 * warm and theirs["above"] >= 4 * ours["above"]
