"""The one line per stage: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys

import pytest

from hfsd import progress


@pytest.mark.parametrize("terminal", [True, False])
def test_done_total_rate_and_note_are_shown(
    terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "140")
    with progress.track("train sft", 1, "steps") as advance:
        advance(0, total=12)  # known only once the stage has begun
        for step in range(12):
            advance(note=f"loss {step}")
    shown = capsys.readouterr().err
    assert "train sft" in shown and "12/12" in shown and "steps" in shown and "/s" in shown and "loss 11" in shown


def test_a_log_gets_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.track("scan", 100, "sequences") as advance:
        for _ in range(100):
            advance()
    assert capsys.readouterr().err.count("\n") == 1
