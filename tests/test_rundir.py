"""Keys, markers, atomic writes and the lock."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfsd import rundir
from hfsd.errors import HfsdError, Refusal
from hfsd.rundir import Stage


def _made(path: Path, fields: dict | None = None, content: dict | None = None) -> Stage:
    stage = Stage("scan", path, fields or {"scan": {"rows": 3}})
    stage.begin()
    rundir.write_atomic(path / "out.json", json.dumps(content or {"a": 1, "seconds": 2.5}))
    stage.finish(1.0, {})
    return stage


def test_a_key_depends_on_fields_and_inputs_only(tmp_path: Path) -> None:
    one = Stage("a", tmp_path, {"x": 1, "y": 2}, {"scan": "k"})
    assert one.key == Stage("b", tmp_path / "c", {"y": 2, "x": 1}, {"scan": "k"}).key
    assert one.key != Stage("a", tmp_path, {"x": 1, "y": 3}, {"scan": "k"}).key
    assert one.key != Stage("a", tmp_path, {"x": 1, "y": 2}, {"scan": "l"}).key


def test_done_then_skipped_then_refused(tmp_path: Path) -> None:
    stage = _made(tmp_path / "scan")
    assert stage.is_done() and stage.is_done(verify=True)
    with pytest.raises(Refusal, match=r"scan\.rows was 3 and is now 4"):
        Stage("scan", tmp_path / "scan", {"scan": {"rows": 4}}).is_done()


def test_an_unfinished_stage_of_another_recipe_is_refused_too(tmp_path: Path) -> None:
    Stage("scan", tmp_path / "scan", {"rows": 3}).begin()
    assert not Stage("scan", tmp_path / "scan", {"rows": 3}).is_done()
    with pytest.raises(Refusal, match="rows was 3 and is now 4"):
        Stage("scan", tmp_path / "scan", {"rows": 4}).is_done()


def test_the_content_hash_leaves_out_times_and_logs(tmp_path: Path) -> None:
    def content(name: str, data: dict) -> str:
        return _made(tmp_path / name, content=data).marker()["content"]

    first = content("a", {"a": 1, "b": [{"seconds": 2.5}]})
    assert first == content("b", {"a": 1, "b": [{"seconds": 9.0}]})
    assert first != content("c", {"a": 2, "b": [{"seconds": 2.5}]})


def test_a_touched_file_with_the_same_bytes_is_still_done(tmp_path: Path) -> None:
    stage = _made(tmp_path / "scan")
    os.utime(tmp_path / "scan" / "out.json", ns=(1, 1))
    assert stage.is_done()
    (tmp_path / "scan" / "out.json").write_text("{}")
    again = f"hfsd run {tmp_path}/recipe.yaml --out {tmp_path} --redo scan"
    with pytest.raises(HfsdError, match=f"has changed since scan was finished; make it again: {re.escape(again)}$"):
        stage.is_done()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file.json"
    rundir.write_atomic(path, "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(HfsdError, match="No space left on device"):
        rundir.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), rundir.new_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with rundir.new_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["whole"]


HOLD = """
import sys, time
from pathlib import Path
from hfsd.rundir import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_is_refused_while_held_and_taken_over_from_the_dead(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(Refusal, match=f"in use by process {holder.pid}"), rundir.lock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.wait()
    with rundir.lock(tmp_path):  # the file still names the dead process
        assert (tmp_path / ".lock").read_text() == f"{os.getpid()}\n"


def test_what_a_killed_process_left_is_swept_and_never_recorded(tmp_path: Path) -> None:
    import subprocess
    import sys

    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    left, alive = tmp_path / f".cut.{dead.pid}.tmp", tmp_path / ".cut.1.tmp"
    for folder in (left, alive):
        folder.mkdir()
        (folder / "model.safetensors").write_text("half")
    with rundir.new_folder(tmp_path / "cut") as target:
        (target / "whole").write_text("x")
    assert not left.exists() and alive.exists()  # process 1 is there: it may be somebody's at work
    assert (tmp_path / "cut" / "whole").is_file()


def test_a_link_never_writes_into_the_file_that_stands_there(tmp_path: Path) -> None:
    mine, other = tmp_path / "mine", tmp_path / "other"
    mine.write_text("mine")
    other.write_text("other")
    rundir.link_or_copy(mine, tmp_path / "target")
    rundir.link_or_copy(other, tmp_path / "target")
    assert mine.read_text() == "mine" and (tmp_path / "target").samefile(other)
