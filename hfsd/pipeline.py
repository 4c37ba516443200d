"""A run: the ordered stages of a recipe, preflight of facts, and skip, resume or refuse.

    scan -> prune ----\\
                       +-> train (per arm) -> merge -> evaluate (per variant) -> compare -> report -> publish
    rewrite ----------/

Under a launcher (torchrun, accelerate launch) every process scans, trains and evaluates; the first one does the
rest, and writes.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfsd import processes, recipes
from hfsd.errors import BadRequest, HfsdError, nearest
from hfsd.findings import Results
from hfsd.plain import load
from hfsd.recipe import Publish, Recipe
from hfsd.records import STAGES, Receipt
from hfsd.rundir import append_log, lock, write_atomic, write_manifest
from hfsd.session import Session
from hfsd.steps import Step, needed_for, steps, up_to, variants

if TYPE_CHECKING:
    from hfsd.sending import Asked, Pushed

NEED_SCORES = ("evaluate", "report", "publish")  # `compare` measures the models alone
TOGETHER = ("scan", "train", "evaluate")  # stages in which every process of a launcher takes part


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
    recipe, text = read(name_or_path, sets)
    root = Path(out) if out is not None else Path("runs") / recipe.name
    with _held(root, recipe, _evaluates(until, only)) as looked:
        plan = steps(recipe, root)
        wanted = needed_for(plan, only) if only else up_to(plan, until)
        left = processes.same(lambda: _left(recipe, root, plan, wanted, redo, verify, looked))
        if left:
            _execute(recipe, text, root, [s for s in plan if s.stage.name in left])
    return root


@contextmanager
def _held(root: Path, recipe: Recipe, evaluates: bool) -> Iterator[bool]:
    """The lock on the run directory, held by the first process; a wrong recipe makes no directory.

    Args:
        evaluates: the run is to reach the evaluation; of a new one, the tasks are tried.

    Yields whether the facts have been looked at.
    """
    if processes.rank():
        yield False
        return
    new = not root.exists()
    if new:
        preflight(recipe)
        if evaluates:
            _try_tasks(recipe)
    with lock(root):
        yield new


def _left(
    recipe: Recipe, root: Path, plan: list[Step], wanted: list[Step], redo: str | None, verify: bool, looked: bool
) -> list[str]:
    """Names of the steps that are still to be done, after a look at the facts, unless there was one, and at the disk.

    Raises:
        HfsdError: the disk has no room for them.
    """
    from hfsd import disk

    if redo is not None:
        _delete(plan, redo)
    left = {s.stage.name: s.stage.path for s in wanted if not s.stage.is_done(verify)}
    if left and not looked:
        preflight(recipe)
        if {"train", "evaluate"} <= {name.split("/")[0] for name in left}:
            _try_tasks(recipe)
    disk.check(recipe, root, list(left.items()))
    return list(left)


def _evaluates(until: str | None, only: str | None) -> bool:
    """Whether a run up to a stage, or of one stage with what it needs, evaluates."""
    return STAGES.index(until or STAGES[-1]) >= STAGES.index("evaluate") and only in (None, *NEED_SCORES)


def results(root: Path) -> Results:
    """The results of a finished run."""
    path = root / "report" / "results.json"
    if not path.is_file():
        raise BadRequest(f"{root} holds no finished report; finish it with `hfsd run`")
    return load(Results, path)


def push(run: str | Path, to: str, private: bool = False, **asked: Any) -> list[Receipt]:
    """Uploads a finished run to a Hub namespace, or a checkpoint of `hfsd prune` to a repo.

    Args:
        run: a run directory, or a folder with hfsd.json; push/NAMESPACE in it gets the staged folders and receipts.
        to: NAMESPACE for a run, NAMESPACE/NAME for a checkpoint.
        asked: see `hfsd.sending.Asked`.

    Raises:
        BadRequest: every fault that is known before the first byte is sent, a line each.
        HfsdError: an upload failed, or the Hub holds something else than what was sent; push again to go on.
    """
    from hfsd.sending import Asked

    return pushed(Path(run), to, Asked(private=private, **asked)).receipts


def pushed(root: Path, to: str, asked: Asked) -> Pushed:
    """`push`, with its plan."""
    from hfsd import fetch, publish
    from hfsd import preflight as publishing

    if (root / "config.json").is_file():
        with lock(root):
            return publish.checkpoint(root, to, asked)
    results(root)
    recipe = recipes.parse((root / "recipe.yaml").read_text(encoding="utf-8"), str(root / "recipe.yaml"))
    recipes.checked(Publish, {"to": to}, "--to")
    names = [s.stage.name for s in steps(recipe, root) if s.kind != "publish"]
    with lock(root):
        faults = publishing.markers(root, names)
        return publish.to_hub(recipe, root, fetch.resolve(recipe.model), root / "push" / to, to, asked, faults)


def staged_space(root: Path) -> Path:
    """The folder of a finished run's Space."""
    found = sorted((root / "publish").glob("*/app.py"))
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
    from hfsd import harness, merge, rewrite, train

    faults = _path_faults(recipe) + rewrite.faults(recipe.rewrite) + train.check_fields(recipe.train)
    faults += [f"merge: {fault}" for fault in (merge.faults(recipe.merge.method) if recipe.merge else [])]
    faults += _publish_faults(recipe)
    faults += harness.faults(recipe.evaluate, [v.id for v in variants(recipe)])
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


def _publish_faults(recipe: Recipe) -> list[str]:
    """A run that publishes to the Hub needs a token and licenses: told now, and not after hours of work."""
    from hfsd import preflight as publishing

    if recipe.publish.to == "folder":
        return []
    try:
        faults = publishing.token(recipe.publish.to, proposes=False, collects=True)[1]
    except HfsdError as error:  # the Hub cannot be reached
        faults = [str(error)]
    return [f"publish: {fault}" for fault in [*faults, *publishing.unlicensed(recipe)]]


def _cut_faults(recipe: Recipe) -> list[str]:
    """A cut that does not fit the model's depth, or a model that is not there."""
    from hfsd import fetch, surgery

    name, asked = recipe.model.path, recipe.prune
    try:
        depth = fetch.depth_of(recipe.model)
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


def _try_tasks(recipe: Recipe) -> None:
    """Loads what the evaluation will load: hours of training must not end at a data set that cannot be had.

    Packaged tasks are always there. Others are downloaded here, unless they are in the cache already.

    Raises:
        BadRequest: every fault, one line each.
    """
    from hfsd import harness, models

    asked, folder = recipe.evaluate, Path(recipe.model.path).expanduser()
    faults = []
    if asked.engine == "vllm" and importlib.util.find_spec("vllm") is None:
        faults.append(
            "evaluate.engine: vllm needs vLLM in this environment; install it, or use evaluate.engine: endpoint"
        )
    for field in ("chat_template", "multiturn"):
        if getattr(asked, field) and folder.is_dir():
            tokenizer = models.load_tokenizer(folder, recipe.model.trust_remote_code)
            if not tokenizer.chat_template:
                faults.append(f"evaluate.{field}: the tokenizer in {folder} has no chat template; leave {field} out")
    tasks = harness.Tasks(asked, Path())
    try:
        tasks.load([unit for unit in tasks.units if unit.names[0] not in harness.SUITES["demo"]])
    except BadRequest as error:
        faults.append(str(error))
    if faults:
        raise BadRequest("\n".join(faults))


def read(name_or_path: str | Path | Recipe, sets: list[str] | None) -> tuple[Recipe, str]:
    """The recipe and its source text.

    Raises:
        BadRequest: its shape has faults; they are told together with those that the rest has against facts.
    """
    if isinstance(name_or_path, Recipe):
        return name_or_path, yaml.safe_dump(recipes.dump(name_or_path), sort_keys=False)
    try:
        return recipes.load(str(name_or_path), sets)
    except BadRequest as error:
        if error.rest is not None:
            try:
                preflight(error.rest, fetch=False)
            except BadRequest as more:
                raise BadRequest(f"{error}\n{more}") from None
        raise


def _execute(recipe: Recipe, text: str, root: Path, todo: list[Step]) -> None:
    from hfsd.progress import quiet

    quiet()
    first = processes.rank() == 0
    if first:
        write_recipe(recipe, text, root)
    work = Session(recipe, root, variants(recipe))
    for step in todo:
        if first:
            _do(step, work, root)
        elif step.kind in TOGETHER:
            step.do(work, step.stage)
        processes.wait()


def write_recipe(recipe: Recipe, text: str, root: Path) -> None:
    """recipe.yaml, with every field, and recipe.source.yaml, the text that was given."""
    source = root / "recipe.source.yaml"
    if not source.is_file() or source.read_text(encoding="utf-8") != text:
        write_atomic(source, text)
    write_atomic(root / "recipe.yaml", yaml.safe_dump(recipes.dump(recipe), sort_keys=False, allow_unicode=True))


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
