"""Families of a namespace on the Hub, and the records of one, so that another machine can report them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfsd import familyfile, hub, loading, plain, report
from hfsd.blocks import NAME
from hfsd.errors import BadRequest
from hfsd.familyfile import FamilyFile
from hfsd.findings import Answer, Estimate, Results
from hfsd.markdown import clean
from hfsd.rundir import new_folder


@dataclass(frozen=True)
class Line:
    """One family as its namespace shows it. `removed` of `n_layers` blocks; `recovery` is percent, by variant id.

    A checkpoint that was pushed by itself has no family file: the numbers are None, and there are no arms.
    """

    pruned: str
    original: str | None
    removed: int | None = None
    n_layers: int | None = None
    arms: list[str] = field(default_factory=list)
    recovery: dict[str, Estimate] = field(default_factory=dict)
    repos: dict[str, str] = field(default_factory=dict)

    @property
    def sentence(self) -> str:
        cut = "" if self.removed is None else f", less {self.removed} of its {self.n_layers} blocks"
        said = [f"{self.pruned}: {self.original or 'an original that its card does not name'}{cut}"]
        for variant in ("pruned", *self.arms) if self.removed is not None else ():
            found = self.recovery.get(variant)
            bounds = "" if found is None or found.low is None else f" [{found.low:.1f}, {found.high:.1f}]"
            said.append(f"{variant} {'n/a' if found is None else f'{found.value:.1f} %'}{bounds}")
        return clean(
            said[0] + (f"; recovery: {', '.join(said[1:])}" if said[1:] else "; pushed by itself, see its card")
        )


def families(namespace: str) -> list[Line]:
    """The pruned models of a namespace, each with its arms, found by their tag.

    Raises:
        BadRequest: there is none, or a family file is not what publish writes.
        HfsdError: the Hub cannot be reached.
    """
    lines: list[Line] = []
    seen: set[str] = set()
    for repo, card in hub.tagged_models(namespace, loading.TAG):
        if repo in seen or "layer-pruning" not in (card.get("tags") or []):
            continue
        path = hub.file_if_any(repo, "model", familyfile.NAME, None)
        lines.append(_line(familyfile.read(path, local=False)) if path else Line(repo, _base(card)))
        seen |= {repo, *lines[-1].repos.values()}
    if not lines:
        raise BadRequest(
            f"{namespace}: the Hub shows no model there with the tag {loading.TAG}; check the name, "
            "or run `hf auth login` if they are private"
        )
    return lines


def pull(name: str, out: Path | None = None) -> Path:
    """Fetches the records of a family's run into a new run directory, and writes its report there.

    Args:
        name: any name of the family that `load_family` takes.
        out: None: runs/NAME, by the name of the run.

    Raises:
        BadRequest: there is no such family, it has no records, or `out` is there already.
    """
    found = loading.find(name)
    root = out if out is not None else Path("runs") / _checked(found.file.name, name)
    if root.exists():
        raise BadRequest(f"{root} is there already; give another --out, or remove it first")
    if found.file.records is None:
        raise BadRequest(f"{name}: its family names no records of a run; push the run again")
    records = found.folder(found.file.records)
    try:
        results = plain.load(Results, records / "report" / "results.json")
        lines = (records / "compare" / "answers.jsonl").read_text(encoding="utf-8").split("\n")
        answers = [plain.from_json(Answer, json.loads(line)) for line in lines if line]
    except FileNotFoundError as error:
        missing = Path(str(error.filename)).relative_to(records)
        raise BadRequest(f"{name}: the records of its run have no {missing}; push the run again") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadRequest(f"{name}: the records of its run are of another version, or damaged: {why}") from error
    with new_folder(root) as target:
        for path in sorted(p for p in records.rglob("*") if p.is_file()):
            copy = target / path.relative_to(records)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)  # what the cache keeps are links
        report.write(results, answers, target / "report")
        if not any(place.path for place in found.file.places.values()):  # so that load_family takes this folder too
            shutil.copyfile(found.base / familyfile.NAME, target / familyfile.NAME)
    return root


def _line(file: FamilyFile) -> Line:
    return Line(
        pruned=file.repos.get("pruned", file.name),
        original=file.repos.get("original"),
        removed=file.n_layers - len(file.kept),
        n_layers=file.n_layers,
        arms=file.arms,
        recovery=file.recovery,
        repos=file.repos,
    )


def _base(card: Mapping[str, Any]) -> str | None:
    base = card.get("base_model")
    return base[0] if isinstance(base, list) and base else base or None


def _checked(run: str, name: str) -> str:
    """The name of a run, which is the word of a stranger, as the name of a folder."""
    if not NAME.fullmatch(run):
        raise BadRequest(f"{name}: its run is named {run!r}, which is no name of a run; give --out")
    return run
