"""Speed in turns, and the memory of a model alone, which is not that of the process that asks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from hfsd import models, speed
from hfsd.speed import Alone, peak_alone

ALONE = Alone("", "float32", False, None, 1)


def test_every_model_has_its_turns(model_folder: Path) -> None:
    model = models.load(model_folder)
    found = speed.side_by_side({"original": model, "again": model})
    assert list(found) == ["original", "again"]
    for one in found.values():
        for estimate in (one.prefill, one.decode):
            assert 0 < estimate.low <= estimate.value <= estimate.high  # type: ignore[operator]
    assert speed.setting(model) == "cpu, 1 thread, float32"


def test_the_peak_is_the_model_s_own(model_folder: Path) -> None:
    ballast = bytearray(b"1") * (1 << 30)  # ours, which Linux would count in the new process's ru_maxrss
    peak, said = peak_alone(dataclasses.replace(ALONE, folder=str(model_folder)))
    assert peak is not None and 50 << 20 < peak < len(ballast) and said == "peak: a process of its own"


def test_a_process_that_fails_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho before >&2\necho out of memory >&2\nexit 3\n")
    python.chmod(0o755)
    monkeypatch.setattr(speed.sys, "executable", str(python))
    assert peak_alone(ALONE) == (None, "no peak: the process ended with code 3 and said out of memory")
