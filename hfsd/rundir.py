"""A run directory: keys, markers, atomic writes, the lock, provenance.

A stage's folder holds START.json (key of what is being made), then its outputs, and last DONE.json.
Same key and outputs of the recorded size and mtime: skip. START without DONE: resume. Another key: refuse and name the
fields that differ.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from hfsd.errors import HfsdError, Refusal
from hfsd.plain import dumps, flat
from hfsd.records import SCHEMA

START, DONE = "START.json", "DONE.json"
PACKAGES = ("hfsd", "torch", "transformers", "datasets", "peft", "trl", "accelerate", "lm_eval", "huggingface_hub")
# Measured, not made: these keys differ between two equal runs and are left out of the content hash.
VOLATILE = {"seconds", "tokens_per_second", "train_seconds", "stage_seconds", "peak_bytes"}
VOLATILE |= {"speedup", "prefill", "decode", "measured"}  # of drafts and costs
VOLATILE |= {"date", "start_time", "end_time", "total_evaluation_time_seconds"}  # lm-eval's
UNHASHED = (".log", ".png", ".md", ".html")  # logs, pictures, and pages that print times; what they show is in the JSON


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its folder, the recipe fields it depends on (dotted), and the keys of its real inputs."""

    name: str
    path: Path
    fields: dict[str, Any]
    inputs: dict[str, str] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """sha256 of the fields and the input keys, 16 hex digits."""
        return hashlib.sha256(dumps({"fields": self.fields, "inputs": self.inputs}).encode()).hexdigest()[:16]

    def is_done(self, verify: bool = False) -> bool:
        """Whether the marker is there, of this key, and its outputs stand as recorded.

        Args:
            verify: hash the outputs again instead of trusting size and mtime.

        Raises:
            Refusal: the folder was made, or begun, with other fields or from other inputs.
            HfsdError: an output is missing or changed since the marker was written.
        """
        for marker in (DONE, START):
            if (self.path / marker).is_file():
                self._same_key(read_json(self.path / marker))
        if not (self.path / DONE).is_file():
            return False
        for name, seen in read_json(self.path / DONE)["outputs"].items():
            self._as_recorded(name, seen, verify)
        self._tidy()
        return True

    def begin(self) -> Path:
        """Makes the folder and says which key is being made, so that a resume with another key is refused."""
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / START).is_file():
            write_atomic(self.path / START, dumps({"key": self.key, "fields": self.fields, "inputs": self.inputs}))
        return self.path

    def finish(self, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
        """Writes DONE.json, last and atomically. `facts` are provenance: seed, model, dataset, device."""
        outputs = {}
        for path in sorted(p for p in self.path.rglob("*") if p.is_file() and p.name not in (START, DONE)):
            name = path.relative_to(self.path).as_posix()
            if any(part.startswith(".") for part in Path(name).parts) or name.startswith("work/"):
                continue  # what resuming needed and the result does not
            stat = path.stat()
            outputs[name] = {"sha256": sha256(path), "size": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        marker = {
            "schema": SCHEMA,
            "key": self.key,
            "fields": self.fields,
            "inputs": self.inputs,
            "outputs": outputs,
            "content": _content(self.path, outputs),
            "seconds": round(seconds, 3),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "packages": package_versions(),
            "git": git_state(),
            **facts,
        }
        write_atomic(self.path / DONE, dumps(marker))
        self._tidy()  # last: until the marker stands, a kill must find what resuming needs
        return marker

    def marker(self) -> dict[str, Any]:
        """The DONE.json of this stage."""
        return read_json(self.path / DONE)

    def _tidy(self) -> None:
        (self.path / START).unlink(missing_ok=True)
        if (self.path / "work").is_dir():
            shutil.rmtree(self.path / "work")

    def _same_key(self, marker: dict[str, Any]) -> None:
        if marker["key"] == self.key:
            return
        was, now = flat(marker["fields"]), flat(self.fields)
        differ = [
            f"{k} was {json.dumps(was.get(k))} and is now {json.dumps(now.get(k))}"
            for k in sorted(was.keys() | now.keys())
            if was.get(k) != now.get(k)
        ]
        if not differ:
            differ = [f"its input '{k}' was made again" for k, v in self.inputs.items() if marker["inputs"].get(k) != v]
        stage = self.name.split("/")[0]
        raise Refusal(
            f"{self.name} in {self.path.parent} was made with another recipe: {'; '.join(differ)}. "
            f"Add --redo {stage} to make {stage} and the stages that depend on it again, or give another --out"
        )

    def _as_recorded(self, name: str, seen: dict[str, Any], verify: bool) -> None:
        path, stage = self.path / name, self.name.split("/")[0]
        root = self.path.parents[self.name.count("/")]
        again = shlex.join(["hfsd", "run", str(root / "recipe.yaml"), "--out", str(root), "--redo", stage])
        try:
            stat = path.stat()
        except FileNotFoundError:
            raise HfsdError(f"{path} is gone since {self.name} was finished; make it again: {again}") from None
        same = stat.st_size == seen["size"] and (verify or stat.st_mtime_ns == seen["mtime_ns"])
        if same and verify:
            same = sha256(path) == seen["sha256"]
        elif not same and stat.st_size == seen["size"]:
            same = sha256(path) == seen["sha256"]  # a copied run directory keeps its bytes and loses its mtimes
        if not same:
            raise HfsdError(f"{path} has changed since {self.name} was finished; make it again: {again}")


@contextmanager
def lock(root: Path) -> Iterator[None]:
    """Holds the run directory for this process. The kernel drops the lock of a dead process, so none goes stale.

    Raises:
        Refusal: another live process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with open(root / ".lock", "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise Refusal(
                f"{root} is in use by process {handle.read().strip() or 'unknown'}; "
                "wait for it to end or give another --out"
            ) from None
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield


def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file so that it is either whole or not there: temporary name, fsync, rename.

    Raises:
        HfsdError: the disk is full or read-only.
    """
    data = content.encode("utf-8") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise HfsdError(f"cannot write {path}: {error.strerror}; free some space or give another --out") from error


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that appears under its name only when the block ends without an error, replacing an older one.

    Raises:
        HfsdError: the disk is full or read-only; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    absent = [p for p in temporary.parents if not p.exists()]  # innermost first
    _sweep(path)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    except OSError as error:
        raise HfsdError(f"cannot write {path}: {error.strerror}; free some space or give another --out") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if not path.exists():
            for parent in absent:
                with suppress(OSError):  # not made, or somebody else's by now
                    parent.rmdir()


def _sweep(path: Path) -> None:
    """Removes what processes that were killed left of this folder."""
    for left in path.parent.glob(f".{path.name}.*.tmp"):
        owner = left.name.split(".")[-2]
        if owner == str(os.getpid()) or not psutil.pid_exists(int(owner)):
            shutil.rmtree(left, ignore_errors=True)


def merged_folder(root: Path, variant_id: str) -> Path:
    """The stock checkpoint of a trained or merged variant of a run."""
    stage = "merge" if (root / "merge" / variant_id).is_dir() else "train"
    return root / stage / variant_id / "merged"


def link_or_copy(source: Path, target: Path) -> None:
    """A hard link, which costs no space; a copy across file systems. What stood there is let go, not changed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # it may be a link itself: writing into it would change a file of somebody else
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def write_manifest(root: Path) -> None:
    """Rebuilds manifest.json from the markers: per stage its key, content hash, seconds and time of finishing."""
    stages = {}
    for marker in sorted(root.rglob(DONE)):
        done = read_json(marker)
        stages[marker.parent.relative_to(root).as_posix()] = {
            k: done[k] for k in ("key", "content", "seconds", "finished")
        }
    write_atomic(root / "manifest.json", dumps({"schema": SCHEMA, "stages": stages}))


def append_log(root: Path, line: str) -> None:
    """One line in run.log, with the time."""
    with open(root / "run.log", "a", encoding="utf-8") as handle:
        handle.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {line}\n")


@functools.cache
def package_versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def git_state() -> str | None:
    """`COMMIT` or `COMMIT-dirty` of the checkout that hfsd runs from; None outside of one (a wheel)."""
    here = Path(__file__).resolve().parent.parent
    if not (here / ".git").exists():
        return None

    def git(*args: str) -> str | None:
        done = subprocess.run(("git", "-C", str(here), *args), capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit = git("rev-parse", "HEAD")
        return f"{commit}-dirty" if commit and git("status", "--porcelain") else commit
    except OSError:  # no git on this machine
        return None


def _content(root: Path, outputs: dict[str, dict[str, Any]]) -> str:
    """Hash of the outputs without times, memory and logs: equal for an undisturbed run and a resumed one."""
    digest = hashlib.sha256()
    for name, seen in sorted(outputs.items()):
        if name.endswith(UNHASHED):
            continue
        part = seen["sha256"]
        if name.endswith(".json"):
            part = hashlib.sha256(dumps(_without_volatile(read_json(root / name))).encode()).hexdigest()
        digest.update(f"{name} {part}\n".encode())
    return digest.hexdigest()


def _without_volatile(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_volatile(v) for k, v in data.items() if k not in VOLATILE}
    return [_without_volatile(v) for v in data] if isinstance(data, list) else data


def read_json(path: Path) -> Any:
    """A marker or another JSON file of a run. Raises HfsdError where it is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise HfsdError(f"{path} is not JSON; delete the folder {path.parent} and run again") from None
