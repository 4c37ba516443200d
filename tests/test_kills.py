"""Killed while pruning, rewriting or training: the next run continues and ends as an undisturbed one does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hfsd import pipeline, recipes
from tests import tiny

SLOW = {"rewrite__batch_rows": 2, "rewrite__temperature": 0.7, "rewrite__max_new_tokens": 24}
STEPS = {"train__sft": {"per_device_train_batch_size": 2, "save_steps": 2}}


@pytest.fixture(scope="module")
def recipe(model_folder: Path):
    return tiny.recipe(model_folder, **SLOW, **STEPS)


@pytest.fixture(scope="module")
def undisturbed(recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(recipe, out=tmp_path_factory.mktemp("undisturbed") / "tiny", until="train")


def _kill_when(seen, recipe, root: Path, by: signal.Signals = signal.SIGKILL) -> int:
    """Starts `hfsd run`, ends it by a signal as soon as `seen()` is true, and returns its exit code."""
    file = root.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipes.dump(recipe)))
    command = [sys.executable, "-c", "from hfsd.cli import main; main()", "run", str(file), "--out", str(root)]
    with open(root.parent / "log", "w") as log:
        started = subprocess.Popen([*command, "--until", "train"], stdout=log, stderr=log)
    try:
        end = time.monotonic() + 240
        while not seen():
            assert started.poll() is None, (
                f"ended before it could be killed: {(root.parent / 'log').read_text()[-2000:]}"
            )
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        code = _ended(started, by)
    return code


def _ended(process: subprocess.Popen, by: signal.Signals) -> int:
    """Signals until the process has ended: Python loses a Ctrl-C that meets it in a finaliser.

    Seldom: one that meets the interpreter's own end, on a busy machine, would end it by the signal.
    """
    for _ in range(8):
        process.send_signal(by)
        try:
            return process.wait(15)
        except subprocess.TimeoutExpired:
            continue
    process.kill()
    pytest.fail(f"process {process.pid} did not end by {by.name}")


def _content(root: Path, stage: str) -> str:
    return json.loads((root / stage / "DONE.json").read_text())["content"]


def test_killed_while_pruning(recipe, undisturbed: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    _kill_when(lambda: any((root / "prune").glob(".checkpoint.*.tmp/model.safetensors")), recipe, root)
    assert not (root / "prune" / "DONE.json").exists()
    pipeline.run(recipe, out=root, until="prune")
    assert _content(root, "prune") == _content(undisturbed, "prune")
    assert {p.name for p in (root / "prune").iterdir()} == {"checkpoint", "prune.json", "DONE.json"}


def test_ctrl_c_while_rewriting(recipe, undisturbed: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    log = root / "rewrite" / "work" / "batches.jsonl"
    code = _kill_when(lambda: log.is_file() and b"\n" in log.read_bytes(), recipe, root, signal.SIGINT)
    told = (tmp_path / "log").read_text()
    assert code == 130 and "interrupted; run the same command again to continue" in told and "Traceback" not in told
    pipeline.run(recipe, out=root, until="rewrite")
    assert _content(root, "rewrite") == _content(undisturbed, "rewrite")


def test_killed_while_rewriting(recipe, undisturbed: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    log = root / "rewrite" / "work" / "batches.jsonl"
    _kill_when(lambda: log.is_file() and log.read_bytes().count(b"\n") >= 2, recipe, root)
    assert not (root / "rewrite" / "DONE.json").exists()
    made = log.read_bytes()
    log.write_bytes(made + b'{"batch": 3, "completions": [{"id"')  # what a kill in mid-write leaves
    pipeline.run(recipe, out=root, until="rewrite")
    assert _content(root, "rewrite") == _content(undisturbed, "rewrite")
    assert _content(root, "prune") == _content(undisturbed, "prune")
    rows = [json.loads(line) for line in (root / "rewrite" / "rewrites.jsonl").read_text().splitlines()]
    assert len({r["id"] for r in rows}) == 12
    assert not (root / "rewrite" / "work").exists()


def test_killed_while_training(recipe, undisturbed: Path, tmp_path: Path) -> None:
    root = tmp_path / "tiny"
    arm = "train/self-distilled-gsm-symbolic"
    marker = root / arm / "work" / "checkpoint-2" / "COMPLETE"
    # a little later: in the middle of a step that no checkpoint holds
    _kill_when(lambda: marker.is_file() and time.time() - marker.stat().st_mtime > 0.1, recipe, root)
    assert (root / "train/sft-gsm-symbolic/DONE.json").is_file() and not (root / arm / "DONE.json").exists()
    (root / arm / "work" / "checkpoint-9").mkdir()  # one that was being written when the kill came
    pipeline.run(recipe, out=root, until="train")
    expected, got = (json.loads((r / arm / "train.json").read_text()) for r in (undisturbed, root))
    assert [s for s, _ in got["losses"]] == [s for s, _ in expected["losses"]] == [1, 2, 3, 4, 5, 6]
    assert [v for _, v in got["losses"]] == pytest.approx([v for _, v in expected["losses"]], abs=1e-4)
    assert got["fairness"] == expected["fairness"] and got["tokens"] == expected["tokens"]


def test_two_runs_at_once(tiny_run: Path, model_folder: Path) -> None:
    from hfsd.errors import Refusal
    from hfsd.rundir import lock

    with lock(tiny_run), pytest.raises(Refusal, match="is in use by process"):
        pipeline.run(tiny.recipe(model_folder), out=tiny_run)
