"""Publish: the repos of a run, or of one checkpoint cut by hand, into folders or to the Hub.

Order: the data set and the base of a model go before what points to them; the Space, which names commits, goes last,
and then the collection of them all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from hfsd import models, preflight, sending, short_cards, staging
from hfsd.errors import BadRequest
from hfsd.fetch import Source
from hfsd.plain import dumps
from hfsd.recipe import Recipe
from hfsd.records import Provenance, Receipt
from hfsd.rundir import link_or_copy, new_folder, write_atomic
from hfsd.sending import RECEIPTS, Asked, Batch, Places, Pushed
from hfsd.staging import Family, Repo
from hfsd.text import recovery_text


def run(recipe: Recipe, root: Path, source: Source, out: Path) -> list[Receipt]:
    """The publish stage: into folders, or to the namespace that the recipe names."""
    if recipe.publish.to == "folder":
        return to_folder(recipe, root, source, out)
    return to_hub(recipe, root, source, out, recipe.publish.to, Asked()).receipts


def to_folder(recipe: Recipe, root: Path, source: Source, out: Path) -> list[Receipt]:
    """One folder per repo under `out`, weights hard-linked; receipts carry a hash of each folder's files."""
    family = staging.plan(recipe, root, source, namespace=None)
    receipts = []
    for repo in family.repos:
        places = {r.key: {"path": f"../{r.name}"} for r in family.repos}
        folder = staging.stage(family, repo, out, places)
        files = staging.digests(folder)
        tree = hashlib.sha256(dumps(files).encode()).hexdigest()
        receipts.append(Receipt(repo.name, repo.kind, tree, f"{out.name}/{repo.name}", files))
    write_atomic(out / RECEIPTS, dumps(receipts))
    return receipts


def to_hub(
    recipe: Recipe, root: Path, source: Source, out: Path, namespace: str, asked: Asked, faults: Sequence[str] = ()
) -> Pushed:
    """Uploads the repos of a finished run, and checks what the Hub then holds against them.

    Args:
        out: gets the folders and receipts.json.
        faults: what the caller has found wrong with the run.

    Raises:
        BadRequest: every fault that is known before the first byte is sent, a line each.
        HfsdError: an upload failed, or the Hub holds something else than what was sent.
    """
    family = staging.plan(recipe, root, source, namespace)
    family, unknown = preflight.licensed(family, asked.license)
    batch = Batch(
        namespace,
        family.repos,
        lambda repo, target, places: staging.stage(family, repo, target, places),
        out,
        f"hfsd run {recipe.name}",
        title=next(r.name for r in family.repos if r.key == "pruned"),
        text=f"{recipe.model_name} less {len(family.results.plan.removed)} blocks, and what brings its quality back",
        reading=_reading(family),
        trust_remote_code=recipe.model.trust_remote_code,
    )
    asked = replace(asked, private=asked.private or recipe.publish.private)
    folders = [staging.weights_folder(family, r.key) for r in family.repos if r.kind == "model" and "/" not in r.key]
    pickles = [fault for folder in folders for fault in preflight.pickles(folder)]
    return sending.push(batch, asked, [*faults, *unknown, *pickles, *preflight.space(family, out)])


def _reading(family: Family) -> list[tuple[str, str]]:
    """Keys in the order in which a reader wants them, with a note each: the Space, the models, the data."""
    scores = {v.variant.id: recovery_text(family.results, v) for v in family.results.variants}
    notes = {"space": "All of them side by side", "original": "The unpruned original", "dataset": "What was trained on"}
    models_ = [r.key for r in family.repos if r.kind == "model"]
    notes |= {k: "The adapter by itself" if k.endswith("/adapter") else scores[k] for k in models_ if k != "original"}
    return [(key, notes[key]) for key in ("space", *models_, "dataset")]


def checkpoint(folder: Path, name: str, asked: Asked) -> Pushed:
    """Uploads one checkpoint that `hfsd prune` has made, with a short card.

    Args:
        folder: with hfsd.json, which tells its original and its blocks; gets push/NAMESPACE with what was staged.
        name: NAMESPACE/NAME.

    Raises:
        BadRequest, HfsdError: as `to_hub`.
    """
    namespace, slash, short = name.partition("/")
    made = models.provenance(folder)
    if made is None:
        raise BadRequest(f"{folder} is neither a finished run nor a checkpoint of `hfsd prune`, which has an hfsd.json")
    if not slash:
        raise BadRequest(f"--to {name}: name the repo of a single checkpoint, as {name}/{folder.resolve().name}")
    models.check_folder(folder)
    base = short_cards.base_of(made.original)
    place = (base, "model", made.original.revision) if base else None
    known = preflight.license_of(f"the original {made.original.repo}", None, place, asked.license)
    out = folder / "push" / namespace
    faults = [*preflight.pickles(folder), *preflight.room([folder], out), *([known.fault] if known.fault else [])]

    def stage(repo: Repo, target: Path, places: Places) -> Path:
        return _stage_checkpoint(folder, target / repo.name, made, name, known.facts)

    batch = Batch(namespace, [Repo("pruned", "model", short)], stage, out, "hfsd prune")
    return sending.push(batch, asked, faults)


def _stage_checkpoint(folder: Path, target: Path, made: Provenance, name: str, facts: dict[str, str]) -> Path:
    sent = [p for p in sorted(folder.iterdir()) if p.is_file() and not p.name.startswith(".") and p.name != "README.md"]
    with new_folder(target) as new:
        for path in sent:
            link_or_copy(path, new / path.name)
        own_code = any(p.suffix == ".py" for p in sent)
        staging.write_card(name, short_cards.checkpoint(name, made, facts, own_code), new)
    return target
