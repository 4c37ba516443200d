"""The steps of a run: which a recipe asks for, what each depends on, and so its key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfsd import fetch, recipes, taskfiles, work
from hfsd.blocks_cut import Data
from hfsd.recipe import Recipe
from hfsd.records import STAGES, Variant
from hfsd.rundir import Stage, sha256
from hfsd.session import Session


@dataclass(frozen=True)
class Step:
    """One folder of the run: its stage record, the steps it needs, and what makes it."""

    stage: Stage
    needs: tuple[str, ...]
    do: Callable[[Session, Stage], dict[str, Any]] = field(repr=False)

    @property
    def kind(self) -> str:
        return self.stage.name.split("/")[0]


def steps(recipe: Recipe, root: Path) -> list[Step]:
    """The steps of a recipe in order. A step's key is a hash of the fields it depends on and of its inputs' keys."""
    made: dict[str, Step] = {}
    blocks = recipes.dump(recipe)
    model = {k: v for k, v in blocks["model"].items() if k not in ("name", "license")}
    sets = {d.label: _data_fields(d) for d in recipe.data}
    text = {label: {k: v for k, v in fields.items() if k != "rows"} for label, fields in sets.items()}
    data = next(iter(text.values())) if len(text) == 1 else text

    def add(name: str, do: Callable[[Session, Stage], dict[str, Any]], fields: dict[str, Any], *needs: str) -> str:
        stage = Stage(name, root / name, fields, {n: made[n].stage.key for n in needs})
        made[name] = Step(stage, needs, do)
        return name

    cut_needs: tuple[str, ...] = ()
    if recipe.prune.blocks:
        width = {"blocks": recipe.prune.blocks}
        cut_needs = (add("scan", work.scan, {"model": model, "data": data, "scan": blocks["scan"], "prune": width}),)
    cut = add("prune", work.prune, {"model": model, "prune": blocks["prune"]}, *cut_needs)
    asked = _rewrite_fields(recipe, blocks)
    texts = {
        label: add(recipe.rewrite_step(label), work.rewrite, {"model": model, "data": fields, "rewrite": asked})
        for label, fields in sets.items()
    }
    arms = {
        v.id: add(
            f"train/{v.id}",
            work.train,
            {"data": {"name": v.data}, "train": _train_fields(blocks, v)},
            cut,
            texts[str(v.data)],
        )
        for v in trained(recipe)
    }
    for v in merged(recipe):
        parts = [arms[p.id] for p in merge_parts(recipe, v)]
        arms[v.id] = add(f"merge/{v.id}", work.merge, {"data": data, "merge": blocks["merge"]}, *parts)
    task_files = taskfiles.hashes(recipe.evaluate.data)
    untrained: dict[str, tuple[str, ...]] = {"original": (), "pruned": (cut,)}
    for v in variants(recipe):
        scored = {"model": model, "data": data, "evaluate": _evaluate_fields(recipe, blocks, v, task_files)}
        add(f"evaluate/{v.id}", work.evaluate, scored, *(untrained[v.arm] if v.arm in untrained else (arms[v.id],)))
    measured = blocks["compare"] | _embedder(recipe.compare.similarity_model)
    compared = {"model": model, "data": data, "compare": measured}
    add("compare", work.compare, compared, cut, *arms.values())
    add("report", work.report, {k: v for k, v in blocks.items() if k != "publish"}, *made)
    add("publish", work.publish, {"publish": blocks["publish"]}, "report")
    return list(made.values())


def variants(recipe: Recipe) -> list[Variant]:
    """All variants of a run, in the one order."""
    return [Variant("original"), Variant("pruned"), *trained(recipe), *merged(recipe)]


def trained(recipe: Recipe) -> list[Variant]:
    """The variants that are trained: each arm on each data set, with each seed (named where there are several)."""
    return [Variant(arm, d.label, seed) for d in recipe.data for seed in _seeds(recipe) for arm in recipe.train.arms]


def merged(recipe: Recipe) -> list[Variant]:
    """The variants that are merged: one per seed, where the recipe asks for it."""
    if recipe.merge is None:
        return []
    return [Variant("merged", "-".join(recipe.merge.of), seed) for seed in _seeds(recipe)]


def merge_parts(recipe: Recipe, variant: Variant) -> list[Variant]:
    """The variants that a merged one is made of."""
    assert recipe.merge is not None
    return [Variant(recipe.merge.arm, name, variant.seed) for name in recipe.merge.of]


def _seeds(recipe: Recipe) -> list[int | None]:
    return list(recipe.train.seeds) if len(recipe.train.seeds) > 1 else [None]


def up_to(plan: list[Step], until: str | None) -> list[Step]:
    """The steps up to and including a stage; None: all."""
    return plan if until is None else [s for s in plan if STAGES.index(s.kind) <= STAGES.index(until)]


def needed_for(plan: list[Step], stage: str) -> list[Step]:
    """The steps of a stage and those that they need, and no others."""
    needed: set[str] = set()
    for step in reversed(plan):
        if step.kind == stage or step.stage.name in needed:
            needed |= {step.stage.name, *step.needs}
    return [s for s in plan if s.stage.name in needed]


def _data_fields(d: Data) -> dict[str, Any]:
    """What a data set's rows depend on: its fields, and the bytes of a local file."""
    fields = {k: v for k, v in d.model_dump(mode="json").items() if k not in ("name", "license")}
    path = Path(d.source).expanduser()
    return fields | ({"sha256": sha256(path)} if path.is_file() else {})


def _rewrite_fields(recipe: Recipe, blocks: dict[str, Any]) -> dict[str, Any]:
    """What rewrites depend on: not on where a server is, or on how it and this machine are kept busy."""
    from hfsd import rewrite

    fields = {k: v for k, v in blocks["rewrite"].items() if k not in ("endpoint", "batch_tokens")}
    fields |= rewrite.inputs(recipe.rewrite) | _embedder(recipe.rewrite.similarity_model)
    if recipe.rewrite.endpoint is not None:
        fields["endpoint"] = {"model": recipe.rewrite.endpoint.model}
    return fields


def _embedder(model: str | None) -> dict[str, str]:
    """What similarities depend on beside the model's name: the files of a local one."""
    folder = Path(model).expanduser() if model else None
    if folder is None or not any((folder / name).is_file() for name in ("modules.json", "config.json")):
        return {}  # none, one on the Hub, or no model there, which the stage tells
    return {"similarity_files": fetch.contents(folder)}


def _evaluate_fields(
    recipe: Recipe, blocks: dict[str, Any], variant: Variant, task_files: dict[str, Any]
) -> dict[str, Any]:
    """What scores depend on: the bytes of local files, and not where they or a server lie, or what keeps it busy."""
    left_out = ("data", "endpoint", "batch_tokens", "tensor_parallel")
    fields = {k: v for k, v in blocks["evaluate"].items() if k not in left_out}
    server = recipe.evaluate.endpoint.get(variant.id)
    return fields | {"data": task_files, "served_as": server.model if server else None}


def _train_fields(blocks: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """An arm depends on its own fields only, and not on which other arms and seeds there are."""
    others = {"sdd+kd": ("on_policy",), "on-policy": ("kd",)}.get(variant.arm, ("kd", "on_policy"))
    left_out = ("arms", "adapter_from", "seeds", *others)
    train = {k: v for k, v in blocks["train"].items() if k not in left_out}
    seed = blocks["train"]["seeds"][0] if variant.seed is None else variant.seed
    return {**train, "seed": seed, "adapter_from": blocks["train"]["adapter_from"].get(variant.arm)}
