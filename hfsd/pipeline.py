"""A run: the ordered stages of a recipe, preflight of facts, and skip, resume or refuse.

    scan -> prune ----\\
                       +-> train (per arm) -> merge -> evaluate (per variant) -> compare -> report -> publish
    rewrite ----------/

Under a launcher (torchrun, accelerate launch) every process scans and trains; the first one does the rest, and writes.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hfsd import processes, recipes
from hfsd.errors import BadRequest, HfsdError, nearest
from hfsd.recipe import Data, Publish, Recipe
from hfsd.records import STAGES, Receipt, Results, Variant, load
from hfsd.rundir import Stage, append_log, lock, sha256, write_atomic, write_manifest
from hfsd.session import Session

TOGETHER = ("scan", "train")  # stages in which every process of a launcher takes part


@dataclass(frozen=True)
class Step:
    """One folder of the run: its stage record, the steps it needs, and what makes it."""

    stage: Stage
    needs: tuple[str, ...]
    do: Callable[[Session, Stage], dict[str, Any]] = field(repr=False)

    @property
    def kind(self) -> str:
        return self.stage.name.split("/")[0]


def run(
    name_or_path: str | Path | Recipe,
    sets: list[str] | None = None,
    out: Path | None = None,
    until: str | None = None,
    redo: str | None = None,
    verify: bool = False,
    only: str | None = None,
) -> Path:
    """Runs a recipe to its end, or continues where an earlier run stopped.

    Args:
        name_or_path: a recipe file, the name of a packaged one, or a `Recipe`.
        sets: `a.b=c` overrides.
        out: run directory; None: runs/NAME.
        until: last stage to run.
        redo: a stage whose results are deleted and made again, with those that depend on it.
        verify: hash finished outputs again instead of trusting size and mtime.
        only: a stage to run, with those that it needs and no others.

    Returns:
        The run directory.

    Raises:
        BadRequest: the recipe is wrong (all faults at once), before any weight is loaded.
        Refusal: the directory holds results of another recipe, or another process is using it.
    """
    for option, value in (("--until", until), ("--redo", redo)):
        if value is not None and value not in STAGES:
            raise BadRequest(f"{option} {value}: no such stage{nearest(value, STAGES)}; stages are {', '.join(STAGES)}")
    if isinstance(name_or_path, Recipe):
        recipe, text = name_or_path, yaml.safe_dump(recipes.dump(name_or_path), sort_keys=False)
    else:
        recipe, text = _load(str(name_or_path), sets)
    root = Path(out) if out is not None else Path("runs") / recipe.name
    with _held(root, recipe):
        plan = steps(recipe, root)
        wanted = _needed_for(plan, only) if only else _up_to(plan, until)
        left = processes.same(lambda: _left(recipe, plan, wanted, redo, verify))
        if left:
            _execute(recipe, text, root, [s for s in plan if s.stage.name in left])
    return root


@contextmanager
def _held(root: Path, recipe: Recipe) -> Iterator[None]:
    """The lock on the run directory, held by the first process; a wrong recipe makes no directory."""
    if processes.rank():
        yield
        return
    if not root.exists():
        preflight(recipe)
    with lock(root):
        yield


def _up_to(plan: list[Step], until: str | None) -> list[Step]:
    return plan if until is None else [s for s in plan if STAGES.index(s.kind) <= STAGES.index(until)]


def _needed_for(plan: list[Step], stage: str) -> list[Step]:
    needed: set[str] = set()
    for step in reversed(plan):
        if step.kind == stage or step.stage.name in needed:
            needed |= {step.stage.name, *step.needs}
    return [s for s in plan if s.stage.name in needed]


def _left(recipe: Recipe, plan: list[Step], wanted: list[Step], redo: str | None, verify: bool) -> list[str]:
    """Names of the steps that are still to be done, after a last look at the facts."""
    if redo is not None:
        _delete(plan, redo)
    left = [s.stage.name for s in wanted if not s.stage.is_done(verify)]
    if left:
        preflight(recipe)
    return left


def steps(recipe: Recipe, root: Path) -> list[Step]:
    """The steps of a recipe in order. A step's key is a hash of the fields it depends on and of its inputs' keys."""
    from hfsd import session as work

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
    scored = {"model": model, "data": data, "evaluate": blocks["evaluate"]}
    for v in variants(recipe):
        needs = {"original": (), "pruned": (cut,)}.get(v.arm) or (() if v.arm == "original" else (arms[v.id],))
        add(f"evaluate/{v.id}", work.evaluate, scored, *needs)
    compared = {"model": model, "data": data, "compare": blocks["compare"]}
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


def results(root: Path) -> Results:
    """The results of a finished run."""
    path = root / "report" / "results.json"
    if not path.is_file():
        raise BadRequest(f"{root} holds no finished report; finish it with `hfsd run`")
    return load(Results, path)


def push(root: Path, namespace: str, private: bool = False) -> list[Receipt]:
    """Uploads a finished run to a Hub namespace; its staged folders and receipts lie under push/NAMESPACE.

    Raises:
        BadRequest: the run is not finished, or there is no valid token.
    """
    from hfsd import models, publish

    results(root)
    recipe = recipes.parse((root / "recipe.yaml").read_text(encoding="utf-8"), str(root / "recipe.yaml"))
    recipes.checked(Publish, {"to": namespace}, "--to")
    with lock(root):
        return publish.to_hub(recipe, root, models.resolve(recipe.model), root / "push" / namespace, namespace, private)


def staged_space(root: Path) -> Path:
    """The folder of a finished run's Space."""
    found = sorted((root / "publish").glob("*/family.json"))
    if not found:
        raise BadRequest(f"{root} holds no staged Space; finish the run with `hfsd run`")
    return found[0].parent


def preflight(recipe: Recipe, fetch: bool = True) -> None:
    """Checks what the recipe says against facts: files, tasks, the model's depth, fields of TRL and PEFT.

    Args:
        fetch: look at a model that is not a folder here, too.

    Raises:
        BadRequest: every fault, one line each; no weight has been loaded.
    """
    from hfsd import evaluate, rewrite, train

    faults = _path_faults(recipe) + rewrite.faults(recipe.rewrite) + train.check_fields(recipe.train)
    faults += _token_faults(recipe)
    faults += [f"evaluate.tasks: {fault}" for fault in evaluate.check_tasks(list(recipe.evaluate.tasks))]
    if fetch or Path(recipe.model.path).is_dir():
        faults += _cut_faults(recipe)
    if faults:
        raise BadRequest("\n".join(faults))


def _path_faults(recipe: Recipe) -> list[str]:
    """Files and folders that the recipe names and that are not there."""
    from hfsd import data

    faults: list[str] = []
    for d in recipe.data:
        if data.is_file(d.source) and not Path(d.source).expanduser().is_file():
            faults.append(f"data.source: no file {d.source}")
    calibration = recipe.scan.calibration
    if calibration is not None and data.is_file(calibration) and not Path(calibration).expanduser().is_file():
        faults.append(f"scan.calibration: no file {calibration}")
    for name, path in (("rewrite.from", recipe.rewrite.from_), ("prune.from", recipe.prune.from_)):
        if path is not None and not Path(path).exists():
            faults.append(f"{name}: nothing at {path}")
    arms = recipe.train.arms
    for arm, path in recipe.train.adapter_from.items():
        if arm not in arms:
            faults.append(f"train.adapter_from.{arm}: no such arm{nearest(arm, arms)}; train.arms has {list(arms)}")
        elif not Path(path).is_dir():
            faults.append(f"train.adapter_from.{arm}: no folder {path}")
    return faults


def _token_faults(recipe: Recipe) -> list[str]:
    """A run that publishes to the Hub needs a token: told now, and not after hours of work."""
    from hfsd import hub

    if recipe.publish.to == "folder":
        return []
    try:
        hub.whoami()
    except HfsdError as error:
        return [f"publish.to: {error}"]
    return []


def _cut_faults(recipe: Recipe) -> list[str]:
    """A cut that does not fit the model's depth, or a model that is not there."""
    from hfsd import models, surgery

    name, asked = recipe.model.path, recipe.prune
    try:
        depth = models.depth_of(recipe.model)
    except BadRequest as error:
        return [str(error)]
    if asked.blocks is not None and asked.blocks >= depth:
        return [f"prune.blocks: {asked.blocks} of the {depth} blocks of {name}; 0 to {depth - 1} can go"]
    if asked.range or asked.kept:
        try:
            surgery.plan_by_hand(depth, asked)
        except BadRequest as error:
            return [f"prune.{'remove' if asked.range else 'keep'}: {error} ({name})"]
    return []


def _load(name: str, sets: list[str] | None) -> tuple[Recipe, str]:
    """The recipe; where its shape has faults, they are told together with those that the rest has against facts."""
    try:
        return recipes.load(name, sets)
    except BadRequest as error:
        if error.rest is not None:
            try:
                preflight(error.rest, fetch=False)
            except BadRequest as more:
                raise BadRequest(f"{error}\n{more}") from None
        raise


def _data_fields(d: Data) -> dict[str, Any]:
    """What a data set's rows depend on: its fields, and the bytes of a local file."""
    fields = {k: v for k, v in d.model_dump(mode="json").items() if k not in ("name", "license")}
    path = Path(d.source).expanduser()
    return fields | ({"sha256": sha256(path)} if path.is_file() else {})


def _rewrite_fields(recipe: Recipe, blocks: dict[str, Any]) -> dict[str, Any]:
    """What rewrites depend on: not on where a server is, or on how it and this machine are kept busy."""
    from hfsd import rewrite

    fields = {k: v for k, v in blocks["rewrite"].items() if k not in ("endpoint", "batch_tokens")}
    fields |= rewrite.inputs(recipe.rewrite)
    if recipe.rewrite.endpoint is not None:
        fields["endpoint"] = {"model": recipe.rewrite.endpoint.model}
    return fields


def _train_fields(blocks: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """An arm depends on its own fields only, and not on which other arms and seeds there are."""
    others = {"sdd+kd": ("on_policy",), "on-policy": ("kd",)}.get(variant.arm, ("kd", "on_policy"))
    left_out = ("arms", "adapter_from", "seeds", *others)
    train = {k: v for k, v in blocks["train"].items() if k not in left_out}
    seed = blocks["train"]["seeds"][0] if variant.seed is None else variant.seed
    return {**train, "seed": seed, "adapter_from": blocks["train"]["adapter_from"].get(variant.arm)}


def _execute(recipe: Recipe, text: str, root: Path, todo: list[Step]) -> None:
    from hfsd.progress import quiet

    quiet()
    first = processes.rank() == 0
    if first:
        if (
            not (root / "recipe.source.yaml").is_file()
            or (root / "recipe.source.yaml").read_text(encoding="utf-8") != text
        ):
            write_atomic(root / "recipe.source.yaml", text)
        write_atomic(root / "recipe.yaml", yaml.safe_dump(recipes.dump(recipe), sort_keys=False, allow_unicode=True))
    work = Session(recipe, root, variants(recipe))
    for step in todo:
        if first:
            _do(step, work, root)
        elif step.kind in TOGETHER:
            step.do(work, step.stage)
        processes.wait()


def _do(step: Step, work: Session, root: Path) -> None:
    """One step, from its first marker to its last."""
    append_log(root, f"{step.stage.name} begins, key {step.stage.key}")
    start = time.perf_counter()
    step.stage.begin()
    facts = step.do(work, step.stage)
    seconds = time.perf_counter() - start
    step.stage.finish(seconds, {**work.facts(), **facts})
    write_manifest(root)
    append_log(root, f"{step.stage.name} ends after {seconds:.1f} s")
    print(f"{step.stage.name} done in {seconds:.1f} s", file=sys.stderr)


def _delete(plan: list[Step], redo: str) -> None:
    """Removes a stage's results and those of every step that needs them."""
    gone: set[str] = set()
    for step in plan:
        if step.kind == redo or gone.intersection(step.needs):
            gone.add(step.stage.name)
            shutil.rmtree(step.stage.path, ignore_errors=True)
