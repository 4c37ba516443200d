"""Publish: one folder per repo with exactly the files an upload sends, then the uploads, with a receipt for each.

Order: the data set and the base of a model go before what points to them; the Space, which names commits, goes last.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfsd import hub
from hfsd.assets import assets
from hfsd.cards import DATA_FILES, dataset_card, model_card, pictures, space_card, validate
from hfsd.compare import read as read_answers
from hfsd.errors import HfsdError
from hfsd.fetch import Source
from hfsd.findings import Results
from hfsd.plain import dumps, load
from hfsd.recipe import Recipe
from hfsd.records import Example, Receipt, Rewrite
from hfsd.rewrite import read as read_rewrites
from hfsd.rundir import link_or_copy, merged_folder, new_folder, sha256, write_atomic
from hfsd.text import headline

SPACE_EXAMPLES = 8
SPACE_TOKENS = 256


@dataclass(frozen=True)
class Repo:
    """One repo of a run. `key` is a variant id, `dataset` or `space`; `name` has no namespace."""

    key: str
    kind: str
    name: str


@dataclass(frozen=True)
class Family:
    """What is published together, and under which ids: `ids` maps a key to the id that cards name."""

    recipe: Recipe
    root: Path
    source: Source
    results: Results
    repos: list[Repo]
    ids: dict[str, str]


def run(recipe: Recipe, root: Path, source: Source, out: Path) -> list[Receipt]:
    """The publish stage: into folders, or to the namespace that the recipe names."""
    return (
        to_folder(recipe, root, source, out)
        if recipe.publish.to == "folder"
        else to_hub(recipe, root, source, out, recipe.publish.to)
    )


def to_folder(recipe: Recipe, root: Path, source: Source, out: Path) -> list[Receipt]:
    """One folder per repo under `out`, weights hard-linked; receipts carry a hash of each folder's files."""
    family = plan(recipe, root, source, namespace=None)
    receipts = []
    for repo in family.repos:
        places = {r.key: {"path": f"../{r.name}"} for r in family.repos}
        folder = _stage(family, repo, out, places)
        files = {p.relative_to(folder).as_posix(): sha256(p) for p in _files(folder)}
        tree = hashlib.sha256(dumps(files).encode()).hexdigest()
        receipts.append(Receipt(repo.name, repo.kind, tree, f"{out.name}/{repo.name}", files))
    write_atomic(out / "receipts.json", dumps(receipts))
    return receipts


def to_hub(
    recipe: Recipe, root: Path, source: Source, out: Path, namespace: str, private: bool | None = None
) -> list[Receipt]:
    """Uploads every repo of a finished run, each in one commit, and checks what the Hub then holds against it.

    Raises:
        BadRequest: there is no valid token.
        HfsdError: an upload failed, or the Hub holds something else than what was sent.
    """
    hub.whoami()
    family = plan(recipe, root, source, namespace)
    private = recipe.publish.private if private is None else private
    places: dict[str, dict[str, Any]] = {}
    receipts = []
    for repo in family.repos:
        folder = _stage(family, repo, out, places)
        name = f"{namespace}/{repo.name}"
        print(f"uploading {repo.kind} {name}", file=sys.stderr)
        commit, url = hub.upload(folder, name, repo.kind, private, f"hfsd run {recipe.name}: {repo.key}")
        files = {p.relative_to(folder).as_posix(): sha256(p) for p in _files(folder)}
        _verify(folder, name, repo.kind, commit, files)
        places[repo.key] = {"repo": name, "revision": commit}
        receipts.append(Receipt(name, repo.kind, commit, url, files))
    write_atomic(out / "receipts.json", dumps(receipts))
    return receipts


def plan(recipe: Recipe, root: Path, source: Source, namespace: str | None) -> Family:
    """The repos of a run in the order of their upload, and the ids that the cards give them."""
    results = load(Results, root / "report" / "results.json")
    prefix, data = recipe.publish.prefix or recipe.model_name, "-".join(d.label for d in recipe.data)
    stem = f"{prefix}-pruned{len(results.plan.removed)}"
    repos = [Repo("dataset", "dataset", f"{data}-rewritten-by-{prefix}")]
    if not source.on_hub:  # a pruned model needs a base that others can load
        repos.append(Repo("original", "model", f"{prefix}-original"))
    for line in results.variants:
        if line.variant.arm != "original":
            tail = "" if line.variant.arm == "pruned" else f"-{line.variant.id.replace('+', '-')}"
            repos.append(Repo(line.variant.id, "model", stem + tail))
    repos.append(Repo("space", "space", f"{stem}-compare"))
    ids = {r.key: f"{namespace}/{r.name}" if namespace else r.name for r in repos}
    return Family(recipe, root, source, results, repos, {"original": source.ref.repo, **ids})


def _stage(family: Family, repo: Repo, out: Path, places: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes the folder of one repo, whole or not at all."""
    folder = out / repo.name
    with new_folder(folder) as target:
        if repo.kind == "dataset":
            card = _stage_dataset(family, target)
        elif repo.kind == "space":
            card = _stage_space(family, target, places)
        else:
            card = _stage_model(family, repo.key, target)
        if faults := validate(card):
            raise HfsdError(f"the card of {repo.name} is not fit to be published: {'; '.join(faults)}")
        write_atomic(target / "README.md", card)
    return folder


def _stage_model(family: Family, key: str, target: Path) -> str:
    root = family.root
    folder = {"original": family.source.folder, "pruned": root / "prune" / "checkpoint"}.get(
        key, merged_folder(root, key)
    )
    for path in sorted(p for p in folder.iterdir() if p.is_file() and p.name != "README.md"):
        link_or_copy(path, target / path.name)
    adapter = root / "train" / key / "adapter"
    if adapter.is_dir():
        _stage_adapter(adapter, target / "adapter", family.ids["pruned"])
    for name in pictures(family.results):
        link_or_copy(root / "report" / name, target / name)
    return model_card(family.results, key, family.ids, {})


def _stage_adapter(adapter: Path, target: Path, base: str) -> None:
    """The adapter, pointing at the published pruned model instead of a folder of this machine."""
    for path in sorted(p for p in adapter.iterdir() if p.is_file() and p.name != "README.md"):
        if path.name == "adapter_config.json":
            config = json.loads(path.read_text(encoding="utf-8"))
            config["base_model_name_or_path"] = base
            write_atomic(target / path.name, json.dumps(config, indent=2, sort_keys=True) + "\n")
        else:
            link_or_copy(path, target / path.name)


def _stage_dataset(family: Family, target: Path) -> str:
    recipe, drawn = family.recipe, []
    examples: list[tuple[Example, Rewrite]] = []
    for d in recipe.data:
        rewriting = family.root / recipe.rewrite_step(d.label)
        before = "" if len(recipe.data) == 1 else f"{d.label}-"
        for name in (*DATA_FILES.values(), "rewrites.jsonl"):
            link_or_copy(rewriting / name, target / f"{before}{name}")
        if (rewriting / "shift.png").is_file():  # older runs drew none
            link_or_copy(rewriting / "shift.png", target / f"{before}shift.png")
            drawn.append(f"{before}shift.png")
        examples += read_rewrites(rewriting)[:3]
    return dataset_card(family.results, family.ids, examples, drawn)


def _stage_space(family: Family, target: Path, places: Mapping[str, Mapping[str, Any]]) -> str:
    for path in sorted(assets("space").iterdir()):
        if path.is_file() and path.name != "README.md":
            shutil.copy2(path, target / path.name)
    # The package travels with the Space: the name on PyPI is not ours to trust.
    ignored = shutil.ignore_patterns("__pycache__", "_assets")
    shutil.copytree(Path(__file__).parent, target / "hfsd", ignore=ignored)
    write_atomic(target / "family.json", dumps(_family_json(family, places)))
    return space_card(family.results, family.ids)


def _family_json(family: Family, places: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What the Space reads: where the models are, and answers that it can show before they are loaded."""
    results = family.results
    # The Space holds one set of weights and adapters on it; what is no adapter shows its recorded answers only.
    arms = [v.variant.id for v in results.variants if (family.root / "train" / v.variant.id / "adapter").is_dir()]
    ref = results.original
    original = places.get("original") or {"repo": ref.repo, "revision": ref.revision}
    answers = read_answers(family.root / "compare").answers[:SPACE_EXAMPLES]
    return {
        "name": results.name,
        "title": f"{family.recipe.model_name}: original, SFT and self-distilled",
        "n_layers": results.plan.n_layers,
        "kept": results.plan.kept,
        "original": original,
        "adapters": {arm: _adapter_place(places[arm]) for arm in arms},
        "params": {v.variant.id: v.params for v in results.variants},
        "sentence": results.plan.sentence,
        "headline": headline(results),
        "examples": [{"prompt": a.prompt, "reference": a.reference, "answers": a.answers} for a in answers],
        "repos": family.ids,
        "max_new_tokens": SPACE_TOKENS,
    }


def _adapter_place(place: Mapping[str, Any]) -> dict[str, Any]:
    return {"path": f"{place['path']}/adapter"} if "path" in place else {**place, "subfolder": "adapter"}


def _files(folder: Path) -> Sequence[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file())


def _verify(folder: Path, name: str, kind: str, commit: str, files: Mapping[str, str]) -> None:
    """What the Hub holds at the commit is what was sent: names, sizes, and sha256 where it keeps one."""
    there = hub.files(name, kind, commit)
    for path, digest in files.items():
        size, lfs = there.get(path, (-1, None))
        if size != (folder / path).stat().st_size or (lfs is not None and lfs != digest):
            raise HfsdError(f"{name} at {commit[:12]}: {path} is not what was sent; push again")
    if extra := set(there) - set(files) - {".gitattributes"}:
        raise HfsdError(f"{name} at {commit[:12]} holds files that were not sent: {', '.join(sorted(extra)[:3])}")
