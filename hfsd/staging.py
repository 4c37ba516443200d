"""The folders of repos: exactly the files that an upload sends, whole or not at all; weights are hard-linked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from hfsd import familyfile, hub, short_cards
from hfsd.assets import assets
from hfsd.cards import DATA_FILES, dataset_card, eval_results, model_card, pictures, shown, space_card, validate
from hfsd.compare import read as read_answers
from hfsd.errors import HfsdError
from hfsd.familyfile import FamilyFile, Place
from hfsd.fetch import Source
from hfsd.findings import Results
from hfsd.markdown import without_paths
from hfsd.plain import dumps, load, to_json
from hfsd.recipe import Recipe
from hfsd.records import Example, Rewrite
from hfsd.rewrite import read as read_rewrites
from hfsd.rundir import link_or_copy, merged_folder, new_folder, sha256, write_atomic
from hfsd.text import headline

SPACE_EXAMPLES = 8
SPACE_TOKENS = 256
TERMS = ("LICENSE*", "NOTICE*", "USE_POLICY*")  # that stand beside a model


@dataclass(frozen=True)
class Repo:
    """One repo of a run. `key` is a variant id, `VARIANT/adapter`, `dataset` or `space`; `name` has no namespace."""

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

    @cached_property
    def shared(self) -> dict[str, str]:
        """Hashes of what the pruned model has of the original: hashed once, for the family.json of every repo."""
        kept = self.results.plan.kept
        return familyfile.fingerprints(weights_folder(self, "pruned"), len(kept), kept)


def plan(recipe: Recipe, root: Path, source: Source, namespace: str | None) -> Family:
    """The repos of a run in the order of their upload, and the ids that the cards give them."""
    results = load(Results, root / "report" / "results.json")
    asked, data = recipe.publish, "-".join(d.label for d in recipe.data)
    prefix = asked.prefix or recipe.model_name
    stem = asked.names.format(prefix=prefix, n=len(results.plan.removed))
    repos = [Repo("dataset", "dataset", f"{data}-rewritten-by-{prefix}")]
    if not source.on_hub:  # a pruned model needs a base that others can load
        repos.append(Repo("original", "model", f"{prefix}-original"))
    for line in results.variants:
        if line.variant.arm == "original":
            continue
        tail = "" if line.variant.arm == "pruned" else f"-{line.variant.id.replace('+', '-')}"
        repos.append(Repo(line.variant.id, "model", stem + tail))
        if asked.adapter == "repo" and adapter_folder(root, line.variant.id).is_dir():
            repos.append(Repo(f"{line.variant.id}/adapter", "model", f"{stem}{tail}-adapter"))
    repos.append(Repo("space", "space", f"{stem}-compare"))
    ids = {r.key: f"{namespace}/{r.name}" if namespace else r.name for r in repos}
    return Family(recipe, root, source, results, repos, {"original": source.ref.repo, **ids})


def adapter_folder(root: Path, variant_id: str) -> Path:
    """Where a run keeps the adapter of a variant; not there where every weight was trained, or for a merge."""
    return root / "train" / variant_id / "adapter"


def weights_folder(family: Family, key: str) -> Path:
    """The stock checkpoint of a variant, as the run holds it."""
    own = {"original": family.source.folder, "pruned": family.root / "prune" / "checkpoint"}
    return own.get(key, merged_folder(family.root, key))


def stage(family: Family, repo: Repo, out: Path, places: Mapping[str, Mapping[str, Any]]) -> Path:
    """Writes the folder of one repo, whole or not at all.

    Args:
        places: where each repo of the family is, for family.json: a path, or a repo and its commit.
    """
    folder = out / repo.name
    with new_folder(folder) as target:
        if repo.kind == "dataset":
            card = _stage_dataset(family, target)
        elif repo.kind == "space":
            card = _stage_space(family, target)
        elif repo.key.endswith("/adapter"):
            card = _stage_adapter_repo(family, repo, target)
        else:
            card = _stage_model(family, repo.key, target)
        write_card(repo.name, card, target)
        if repo.key not in ("dataset", "original"):  # those may be of several families
            write_atomic(target / familyfile.NAME, dumps(_family_file(family, repo, places)))
    return folder


def write_card(name: str, card: str, target: Path) -> None:
    """README.md. Raises HfsdError where the Hub would not take it, or a reader should not."""
    if faults := validate(card):
        raise HfsdError(f"the card of {name} is not fit to be published: {'; '.join(faults)}")
    write_atomic(target / "README.md", card)


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a staged folder, by its path in the repo."""
    found = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): sha256(p) for p in found}


def _stage_model(family: Family, key: str, target: Path) -> str:
    root = family.root
    for path in sorted(weights_folder(family, key).iterdir()):
        if path.is_file() and _is_a_models(path.name):
            link_or_copy(path, target / path.name)
    adapter = adapter_folder(root, key)
    if adapter.is_dir() and family.recipe.publish.adapter == "subfolder":
        _stage_adapter(adapter, target / "adapter", family.ids["pruned"])
    for name in pictures(family.results):
        link_or_copy(root / "report" / name, target / name)
    if entries := eval_results(family.results, key):
        write_atomic(target / ".eval_results" / "gsm8k.yaml", entries)
    if key == "pruned":
        _stage_records(family, target / familyfile.RECORDS)
    return model_card(family.results, key, family.ids, {})


def _is_a_models(name: str) -> bool:
    """Whether a file belongs to a checkpoint: a user's folder may hold notes and keys beside it."""
    named = any(fnmatch(name, pattern) for pattern in (*hub.WANTED, *TERMS))
    return named and name != "README.md" and not name.startswith(".")


def _stage_adapter_repo(family: Family, repo: Repo, target: Path) -> str:
    key = repo.key.removesuffix("/adapter")
    _stage_adapter(adapter_folder(family.root, key), target, family.ids["pruned"])
    return short_cards.adapter(family.ids[repo.key], family.ids["pruned"], family.ids[key], family.results)


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
        examples += shown(read_rewrites(rewriting))
    return dataset_card(family.results, family.ids, examples, drawn)


def _stage_space(family: Family, target: Path) -> str:
    for path in sorted(assets("space").iterdir()):
        if path.is_file() and path.name != "README.md":
            shutil.copy2(path, target / path.name)
    # The package travels with the Space: the name on PyPI is not ours to trust.
    ignored = shutil.ignore_patterns("__pycache__", "_assets")
    shutil.copytree(Path(__file__).parent, target / "hfsd", ignore=ignored)
    return space_card(family.results, family.ids)


def _family_file(family: Family, repo: Repo, places: Mapping[str, Mapping[str, Any]]) -> FamilyFile:
    """family.json of one repo. The Space's names commits and has answers to show before the models are loaded; all
    others are alike, so that a change of one repo does not change the others."""
    results, kept = family.results, family.results.plan.kept
    adapters = [v.variant.id for v in results.variants if adapter_folder(family.root, v.variant.id).is_dir()]
    whole = [v.variant.id for v in results.variants if v.variant.id not in (*adapters, "original", "pruned")]
    answers = read_answers(family.root / "compare").answers[:SPACE_EXAMPLES] if repo.kind == "space" else []
    ref = results.original

    def at(key: str, folder: str | None = None, digest: str | None = None) -> Place:
        found = places.get(key) or {"repo": family.ids[key]}
        if "path" in found:
            return Place("/".join([found["path"], *([folder] if folder else [])]), sha256=digest)
        commit = found.get("revision") if repo.kind == "space" else None
        return Place(repo=found["repo"], revision=commit, subfolder=folder, sha256=digest)

    def adapter(arm: str) -> Place:
        digest = sha256(adapter_folder(family.root, arm) / "adapter_model.safetensors")
        alone = f"{arm}/adapter" in family.ids
        return at(f"{arm}/adapter", None, digest) if alone else at(arm, "adapter", digest)

    return FamilyFile(
        name=results.name,
        title=f"{family.recipe.model_name}: original, SFT and self-distilled",
        n_layers=results.plan.n_layers,
        kept=kept,
        original=Place(repo=ref.repo, revision=ref.revision) if family.source.on_hub else at("original"),
        adapters={arm: adapter(arm) for arm in adapters},
        checkpoints={variant: at(variant) for variant in whole},
        params={v.variant.id: v.params for v in results.variants},
        recovery={v.variant.id: v.recovery for v in results.variants if v.recovery},
        sentence=results.plan.sentence,
        headline=headline(results),
        examples=[{"prompt": a.prompt, "reference": a.reference, "answers": a.answers} for a in answers],
        repos=family.ids,
        max_new_tokens=SPACE_TOKENS,
        records=at("pruned", familyfile.RECORDS),
        shared=family.shared,
    )


def _stage_records(family: Family, target: Path) -> None:
    """What another machine needs to report: results, recipe and answers, laid out as in a run directory."""
    write_atomic(target / "report" / "results.json", dumps(_without_paths(to_json(family.results))))
    write_atomic(target / "recipe.yaml", without_paths(family.results.recipe))
    link_or_copy(family.root / "compare" / "answers.jsonl", target / "compare" / "answers.jsonl")


def _without_paths(data: Any) -> Any:
    if isinstance(data, dict):
        return {k: _without_paths(v) for k, v in data.items()}
    if isinstance(data, list):
        return [_without_paths(v) for v in data]
    return without_paths(data) if isinstance(data, str) else data
