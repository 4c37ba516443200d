"""family.json: what a family of repos is made of, where it lies, and the hashes of the weights that its members share.

The pruned model, its arms and their Space carry one each, so that any of them leads to all. Only the Space's names
commits, since it is sent last; what another one names is the newest, and the hashes say whether that still is what it
was made with. The original and the data set carry none: they may be of several families.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from hfsd import hub, models, plain, shards, surgery
from hfsd.errors import BadRequest
from hfsd.findings import Estimate

NAME = "family.json"
RECORDS = "run"  # folder of the pruned model's repo: the records of the run, laid out as in a run directory
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Place:
    """Where a folder is: a path relative to the file that names it, or a repo.

    `revision` None is the newest commit; `sha256` is that of an adapter's weights.
    """

    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class FamilyFile:
    """family.json.

    `checkpoints` are variants that are no adapters: every weight trained, or merged. `shared` maps "block N", in the
    original's numbering, and the name of each tensor outside of the blocks, to the sha256 of what the pruned model has
    there (see `fingerprints`). `repos` are the ids that the cards name, by variant id, "dataset" and "space".
    `examples`, `headline`, `title` and `max_new_tokens` are what the Space shows and allows.
    """

    name: str
    title: str
    n_layers: int
    kept: tuple[int, ...]
    original: Place
    adapters: dict[str, Place]
    checkpoints: dict[str, Place]
    params: dict[str, int]
    recovery: dict[str, Estimate]
    sentence: str
    headline: str
    examples: list[dict[str, Any]]
    repos: dict[str, str]
    max_new_tokens: int
    records: Place | None = None
    shared: dict[str, str] = field(default_factory=dict)

    @property
    def arms(self) -> list[str]:
        return [*self.adapters, *self.checkpoints]

    @property
    def places(self) -> dict[str, Place]:
        """Everything that it names, by what it is."""
        records = {"records": self.records} if self.records else {}
        return {"original": self.original, **self.adapters, **self.checkpoints, **records}


def read(path: Path, local: bool) -> FamilyFile:
    """family.json, checked as the words of a stranger.

    Args:
        local: it lies in a folder of this machine, and may name folders beside its own. One from the Hub may not.

    Raises:
        BadRequest: it is not what publish writes, or it names a path that is not its to name.
    """
    try:
        found = plain.load(FamilyFile, path)
        fault = _fault(found)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if fault:
        raise BadRequest(f"{path} is no family of models: {fault}; push the run again with this version of hfsd")
    for key, place in found.places.items():
        _confined(place, path, key, local)
    return found


def fingerprints(folder: Path, n_layers: int, kept: Sequence[int]) -> dict[str, str]:
    """sha256 of the parts of a checkpoint that original and pruned model share, from the files, nothing loaded.

    Args:
        n_layers: number of blocks in `folder`.
        kept: the original's number of the blocks, in order, that are looked at: all those of a pruned model, whose own
            numbers are others; of the original itself, those of these numbers.

    Returns:
        "block N", in the original's numbering, or the name of a tensor outside of the blocks -> sha256 over names
        (without the block's number), types, shapes and bytes. Blocks behind the stack are left out: no cut keeps them.
    """
    tensors = shards.read(folder)
    prefix = surgery.stack_prefix([t.name for t in tensors], models.config_dict(folder), n_layers)
    numbers = dict(enumerate(kept)) if n_layers == len(kept) else {i: i for i in kept}
    parts: dict[str, list[tuple[str, shards.Tensor]]] = {}
    for tensor in tensors:
        block = re.match(rf"{re.escape(prefix)}\.(\d+)\.(.+)", tensor.name)
        if block is None:
            parts[tensor.name] = [(tensor.name, tensor)]
        elif int(block[1]) in numbers:
            parts.setdefault(f"block {numbers[int(block[1])]}", []).append((block[2], tensor))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(sorted(zip(parts, pool.map(shards.digest, parts.values()), strict=True)))


def differing(found: FamilyFile, original: Path) -> list[str]:
    """Names of the parts in which an original is not the one that the pruned model was cut from; blocks first."""
    mine: Mapping[str, str] = fingerprints(original, found.n_layers, found.kept)
    wrong = [name for name, digest in found.shared.items() if mine.get(name) != digest]
    return sorted(wrong, key=lambda name: (not name.startswith("block "), len(name), name))


def _fault(found: FamilyFile) -> str | None:
    """What is wrong with the numbers and hashes of a file that has the right fields."""
    if list(found.kept) != sorted(set(found.kept)) or not all(0 <= i < found.n_layers for i in found.kept):
        return f"kept blocks {list(found.kept)[:20]} are no ascending numbers of {found.n_layers} blocks"
    if silent := [f"block {i}" for i in found.kept if not DIGEST.fullmatch(str(found.shared.get(f"block {i}")))]:
        return f"it has no sha256 of {silent[0]}"
    return None


def _confined(place: Place, file: Path, key: str, local: bool) -> None:
    """Refuses a place that leads out of where its file may lead."""
    where = f"{file}: {key} is at"
    if place.path is not None:
        home = file.resolve().parent.parent
        inside = not Path(place.path).is_absolute() and (file.parent / place.path).resolve().is_relative_to(home)
        if not local:
            raise BadRequest(f"{where} the path {place.path!r}; a family on the Hub names repos only; refused")
        if not inside:
            raise BadRequest(f"{where} the path {place.path!r}, which is outside of {home}; refused")
    elif place.repo is None or not hub.is_repo_id(place.repo):
        raise BadRequest(f"{where} {place.repo!r}, which is no Hub id such as org/name; refused")
    if place.revision is not None and not hub.COMMIT.fullmatch(place.revision):
        raise BadRequest(f"{where} revision {place.revision!r}, which is no commit; refused")
    sub = PurePosixPath(place.subfolder or "x")
    if sub.is_absolute() or ".." in sub.parts or re.search(r"[*?\[\\]", str(sub)):
        raise BadRequest(f"{where} the subfolder {place.subfolder!r}, which is none of its repo; refused")
