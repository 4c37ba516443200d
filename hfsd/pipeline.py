"""A run: the ordered stages of a recipe, preflight of facts, and skip, resume or refuse.

    scan -> prune ----\\
                       +-> train (per arm) -> evaluate (per variant) -> compare -> report -> publish
    rewrite ----------/
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from hfsd import STAGES, recipes
from hfsd.errors import BadRequest, HfsdError, nearest
from hfsd.recipe import Publish, Recipe
from hfsd.records import Receipt, Results, Variant, load
from hfsd.rundir import Stage, append_log, lock, write_atomic, write_manifest
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


def run(
    name_or_path: str | Path | Recipe,
    sets: list[str] | None = None,
    out: Path | None = None,
    until: str | None = None,
    redo: str | None = None,
    verify: bool = False,
) -> Path:
    """Runs a recipe to its end, or continues where an earlier run stopped.

    Args:
        name_or_path: a recipe file, the name of a packaged one, or a `Recipe`.
        sets: `a.b=c` overrides.
        out: run directory; None: runs/NAME.
        until: last stage to run.
        redo: a stage whose results are deleted and made again, with those that depend on it.
        verify: hash finished outputs again instead of trusting size and mtime.

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
    plan = steps(recipe, root)
    if until is not None:
        plan = [s for s in plan if STAGES.index(s.kind) <= STAGES.index(until)]
    new = not root.exists()
    if new:
        preflight(recipe)  # before the directory is made: a wrong recipe leaves nothing behind
    with lock(root):
        if redo is not None:
            _delete(steps(recipe, root), redo)
        todo = [s for s in plan if not s.stage.is_done(verify)]
        if todo:
            if not new:
                preflight(recipe)
            _execute(recipe, text, root, todo)
    return root


def steps(recipe: Recipe, root: Path) -> list[Step]:
    """The steps of a recipe in order. A step's key is a hash of the fields it depends on and of its inputs' keys."""
    from hfsd import session as work

    made: dict[str, Step] = {}
    blocks = recipes.dump(recipe)
    model = {k: v for k, v in blocks["model"].items() if k not in ("name", "license")}
    data = {k: v for k, v in blocks["data"].items() if k not in ("name", "license", "rows")}
    rows = {**data, "rows": recipe.data.rows}

    def add(name: str, do: Callable[[Session, Stage], dict[str, Any]], fields: dict[str, Any], *needs: str) -> str:
        stage = Stage(name, root / name, fields, {n: made[n].stage.key for n in needs})
        made[name] = Step(stage, needs, do)
        return name

    cut_needs: tuple[str, ...] = ()
    if recipe.prune.blocks:
        width = {"blocks": recipe.prune.blocks}
        cut_needs = (add("scan", work.scan, {"model": model, "data": data, "scan": blocks["scan"], "prune": width}),)
    cut = add("prune", work.prune, {"model": model, "prune": blocks["prune"]}, *cut_needs)
    text = add("rewrite", work.rewrite, {"model": model, "data": rows, "rewrite": blocks["rewrite"]})
    arms = [
        add(
            f"train/{v.id}",
            work.train,
            {"data": {"name": recipe.data_name}, "train": _train_fields(blocks, v)},
            cut,
            text,
        )
        for v in trained(recipe)
    ]
    scored = {"model": model, "data": data, "evaluate": blocks["evaluate"]}
    for v in variants(recipe):
        needs = {"original": (), "pruned": (cut,)}.get(v.arm, (f"train/{v.id}",))
        add(f"evaluate/{v.id}", work.evaluate, scored, *needs)
    compared = {"model": model, "data": data, "compare": blocks["compare"]}
    add("compare", work.compare, compared, cut, *arms)
    add("report", work.report, {k: v for k, v in blocks.items() if k != "publish"}, *made)
    add("publish", work.publish, {"publish": blocks["publish"]}, "report")
    return list(made.values())


def variants(recipe: Recipe) -> list[Variant]:
    """All variants of a run, in the one order."""
    return [Variant("original"), Variant("pruned"), *trained(recipe)]


def trained(recipe: Recipe) -> list[Variant]:
    """The variants that are trained."""
    return [Variant(arm, recipe.data_name) for arm in recipe.train.arms]


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
    from hfsd import evaluate, train

    faults = _path_faults(recipe) + train.check_fields(recipe.train) + _token_faults(recipe)
    faults += [f"evaluate.tasks: {fault}" for fault in evaluate.check_tasks(list(recipe.evaluate.tasks))]
    if fetch or Path(recipe.model.path).is_dir():
        faults += _cut_faults(recipe)
    if faults:
        raise BadRequest("\n".join(faults))


def _path_faults(recipe: Recipe) -> list[str]:
    """Files and folders that the recipe names and that are not there."""
    from hfsd import data

    faults: list[str] = []
    source = recipe.data.source
    if data.is_file(source) and not Path(source).expanduser().is_file():
        faults.append(f"data.source: no file {source}")
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


def _train_fields(blocks: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """An arm depends on its own adapter_from only, and not on which other arms there are."""
    train = {k: v for k, v in blocks["train"].items() if k not in ("arms", "adapter_from")}
    return {**train, "adapter_from": blocks["train"]["adapter_from"].get(variant.arm)}


def _execute(recipe: Recipe, text: str, root: Path, todo: list[Step]) -> None:
    from hfsd.progress import quiet

    quiet()
    if not (root / "recipe.source.yaml").is_file() or (root / "recipe.source.yaml").read_text(encoding="utf-8") != text:
        write_atomic(root / "recipe.source.yaml", text)
    write_atomic(root / "recipe.yaml", yaml.safe_dump(recipes.dump(recipe), sort_keys=False, allow_unicode=True))
    work = Session(recipe, root, variants(recipe))
    for step in todo:
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
