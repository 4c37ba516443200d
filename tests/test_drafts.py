"""The log of drafts and the live line: a write that stops half way, and what an earlier process has done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from hfsd import drafts, likeness, progress, rewrite
from hfsd.blocks_recovery import Rewrite as RewriteRecipe
from hfsd.engines import Completion, Request, Sampling
from hfsd.errors import HfsdError
from tests.test_rewrite import ROWS, SPARE, Fake, _right

ASKED = RewriteRecipe(task="math", batch_rows=4, mode="self")
LIMITED = """
import resource, signal, sys
from pathlib import Path
from tests.test_drafts import ASKED, ROWS, SPARE, Fake, _right, rewrite
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write fails instead
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
rewrite.run(lambda: Fake(_right), ROWS, SPARE, ASKED, "key", Path(sys.argv[1]))
"""


class Slow(Fake):
    """Takes a while per batch."""

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        time.sleep(0.1)
        return super().generate(requests, sampling, seed)


def _lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "work" / "batches.jsonl").read_text().splitlines()]


def test_a_disk_that_is_full_in_mid_line_costs_that_batch_and_nothing_else(tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole", tmp_path / "torn"
    rewrite.run(lambda: Fake(_right), ROWS, SPARE, ASKED, "key", whole)
    first = (whole / "work" / "batches.jsonl").read_bytes().split(b"\n")[0]
    command = [sys.executable, "-c", LIMITED, str(torn), str(len(first) + 200)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert "HfsdError: cannot write" in done.stderr and "File too large; free some space" in done.stderr
    left = (torn / "work" / "batches.jsonl").read_bytes()
    assert left.count(b"\n") == 1 and 150 < len(left.split(b"\n")[1]) < 250  # a line and a part of one
    engine = Fake(_right)
    rewrite.run(lambda: engine, ROWS, SPARE, ASKED, "key", torn)
    assert len(engine.batches) == 2 and [line["batch"] for line in _lines(torn)] == [0, 1, 2]
    assert (torn / "rewrites.jsonl").read_bytes() == (whole / "rewrites.jsonl").read_bytes()


def test_seconds_are_those_of_all_processes(tmp_path: Path) -> None:
    engine = Slow(_right, fails_at=2)
    with pytest.raises(HfsdError, match="the engine is gone"):
        rewrite.run(lambda: engine, ROWS, SPARE, ASKED, "key", tmp_path)
    time.sleep(0.5)  # what is not spent on rewriting
    stats = rewrite.run(lambda: Slow(_right), ROWS, SPARE, ASKED, "key", tmp_path)
    seconds = [line["seconds"] for line in _lines(tmp_path)]
    assert len(seconds) == 3 and all(s >= 0.1 for s in seconds)
    assert stats.seconds == pytest.approx(sum(seconds), abs=2e-3) and stats.n_tokens == 30


def test_the_live_line_tells_what_is_accepted_and_the_pace_of_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LOG_EVERY", 0.0)
    good = {row.id for row in ROWS[:5]}
    with pytest.raises(HfsdError):
        log = tmp_path / "work" / "batches.jsonl"
        made = drafts.Drafts(
            lambda: Slow(lambda r, s: _right(r, s) if r.id in good else "no", fails_at=2),
            ASKED,
            "key",
            log,
            likeness.overlaps,
        )
        made.make(ROWS, SPARE)
    capsys.readouterr()
    again = drafts.Drafts(lambda: Slow(_right), ASKED, "key", log, likeness.overlaps)
    again.make(ROWS, SPARE)
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["4/10", "8/10", "10/10"]
    assert "? s left" in told[0] and told[0].endswith("accepted") and "tokens/s" not in told[1]
    accepted, pace = told[2].split("  ")[-1].split(", ")
    assert accepted == f"{len({row for row, _ in again.accepted}) / 10:.0%} accepted"
    assert pace.endswith(" tokens/s") and 0 < int(pace.split()[0]) <= 60  # 2 rows of 3 tokens in 0.1 s or more
    assert float(told[2].split("/s")[0].split()[-1]) <= 20  # 2 rows, not 10, in that time


def test_a_bar_does_not_take_an_earlier_process_for_speed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "140")
    with progress.track("rewrite", 1002, "drafts") as advance:
        advance(1000, note="old", earlier=True)
        time.sleep(0.2)
        advance(2, note="new")
    shown = capsys.readouterr().err.split("\n")[-2]
    assert "1002/1002" in shown and float(shown.split("/s")[0].split()[-1]) <= 10
