"""A sweep: one curve per field, each point a run of its own that takes over every stage that others have made.

Curves are no grid: along each one, every other field stands at the recipe's value. A point that is the same recipe in
two curves is run once.
"""

from __future__ import annotations

import dataclasses
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from hfsd import curves, pipeline, processes, recipes
from hfsd.curves import Curve, Mark, Point, SweepResult, text
from hfsd.differences import at_n, counted
from hfsd.errors import BadRequest, HfsdError
from hfsd.findings import Results
from hfsd.plain import dumps
from hfsd.recipe import Recipe
from hfsd.rundir import DONE, Stage, append_log, link_or_copy, lock, new_folder, read_json, write_atomic, write_manifest
from hfsd.steps import Step, steps, up_to
from hfsd.text import setups
from hfsd.units import plural

__all__ = ["SweepResult", "parse", "planned", "run", "text"]

LAST = "report"  # what is published is a run, not a sweep
NO_CURVE = ("name", "publish")  # blocks that change no score
WEIGHTS = ".safetensors"


@dataclass(frozen=True)
class Run:
    """One value of a field: the recipe of its run, the `--set`s that make it of the sweep's own, and where it lies."""

    name: str
    value: str
    recipe: Recipe
    sets: list[str]
    folder: Path


def run(
    name_or_path: str | Path, over: Sequence[str], sets: list[str] | None = None, out: Path | None = None
) -> SweepResult:
    """Runs a recipe at every value of every field, or goes on where an earlier sweep stopped, and draws the curves.

    The folder gets a run per point (FIELD=VALUE), sweep.json, sweep.md and a picture per field. Finished stages of
    other points there, and of the recipe's ordinary run at runs/NAME, are taken over where their keys are equal.

    Args:
        name_or_path: a recipe file, or the name of a packaged one.
        over: `a.b=v1,v2,...`, one per curve; in a list of data sets, `data.x` stands for that field of each.
        sets: `a.b=c` overrides, for all points.
        out: the sweep's folder; None: runs/NAME-sweep.

    Raises:
        BadRequest: faults of the recipe, of `over` or of any point, all at once and before the first point runs.
        HfsdError: a point failed; it is named, and finished points and stages are kept.
    """
    base, source = pipeline.read(name_or_path, sets)
    root = Path(out) if out is not None else Path("runs") / f"{base.name}-sweep"
    found = planned(base, over, root)
    runs = _distinct(found)
    asked = ["hfsd", "run", str(name_or_path), *(part for one in sets or [] for part in ("--set", one))]
    first = processes.rank() == 0
    processes.same(lambda: _preflight(runs))
    with lock(root) if first else nullcontext():
        if first:
            pipeline.write_recipe(base, source, root)
        for at, one in enumerate(runs, 1):
            _say(f"point {at} of {len(runs)}: {one.name}")
            with _named(one, asked):
                if first:
                    _take(one, [Path("runs") / base.name, *sorted(root.glob("*=*"))])
                pipeline.run(one.recipe, out=one.folder, until=LAST)
        result = _gathered(base, root, found)
        if first:
            write_atomic(root / "sweep.json", dumps(result))
            curves.draw(result, root)
            write_atomic(root / "sweep.md", curves.markdown(result))
    return result


def planned(base: Recipe, over: Sequence[str], root: Path) -> dict[str, list[Run]]:
    """The points of every curve, by field. A recipe that two curves share has one folder.

    Raises:
        BadRequest: every fault of `over`, one line each.
    """
    faults: list[str] = []
    found: dict[str, list[Run]] = {}
    folders: dict[str, Path] = {}
    for item in over:
        try:
            field, values = parse(item)
            if field in found:
                raise BadRequest(f"--over {item}: {field} is swept twice; give all of its values at once")
            found[field] = []
            for value, recipe, sets in _recipes(base, field, values):
                name = f"{field}={value}"
                folder = folders.setdefault(dumps(recipes.dump(recipe)), root / quote(name, safe="=,:+"))
                found[field].append(Run(name, value, recipe, sets, folder))
        except BadRequest as error:
            faults += str(error).splitlines()
    if not over:
        faults.append("a sweep needs --over a.b=v1,v2, such as --over prune.blocks=2,4,6,8")
    if faults:
        raise BadRequest("\n".join(faults))
    return found


def _distinct(found: dict[str, list[Run]]) -> list[Run]:
    """The runs in order; one that two curves share goes by its first name, as its folder does."""
    runs: dict[Path, Run] = {}
    for points in found.values():
        for one in points:
            runs.setdefault(one.folder, one)
    return list(runs.values())


def parse(item: str) -> tuple[str, list[str]]:
    """`a.b=v1,v2` -> (`a.b`, [`v1`, `v2`]): the field and its values, each spelled as a `--set` would take it.

    Values are those of a YAML list, so that `[0,1],[2,3]` are two, and a text with a comma stands in quotes.

    Raises:
        BadRequest: no field, no list, fewer than two values, or one of them twice.
    """
    field, sign, listed = item.partition("=")
    if not sign or not field.strip("."):
        raise BadRequest(f"--over {item}: write it as a.b=v1,v2, such as --over prune.blocks=2,4,6,8")
    line = f"[{listed}]"
    try:
        node = yaml.compose(line, recipes.Loader)
    except yaml.YAMLError:
        node = None
    if node is None or node.end_mark.index < len(line):  # a bracket of the values' own closed the list
        raise BadRequest(f"--over {item}: {listed!r} is no list v1,v2; put a text with , : # or brackets in quotes")
    values = [line[v.start_mark.index : v.end_mark.index] for v in node.value]
    if len(values) < 2:
        raise BadRequest(f"--over {item}: a curve needs two values or more; for a single one use --set {item}")
    if twice := sorted({v for v in values if values.count(v) > 1}):
        raise BadRequest(f"--over {item}: {', '.join(twice)} is there twice")
    return field, values


def _recipes(base: Recipe, field: str, values: Sequence[str]) -> list[tuple[str, Recipe, list[str]]]:
    """The recipe at each value, and the `--set`s that make it; every fault at once."""
    if field.split(".")[0] in NO_CURVE:
        raise BadRequest(f"--over {field}: changes no score, so that there is no curve over it")
    found: list[tuple[str, Recipe, list[str]]] = []
    faults: list[str] = []
    for value in values:
        plain = recipes.dump(base)
        sets = [f"{f}={value}" for f in _fields(field, plain)]
        try:
            recipe = recipes.validate(plain, f"--over {field}", sets)
        except BadRequest as error:
            faults += [line.replace("--set", "--over", 1) for line in str(error).splitlines()]
            continue
        if same := next((other for other, known, _ in found if known == recipe), None):
            faults.append(f"--over {field}: {same} and {value} are the same value")
        found.append((value, recipe, sets))
    if faults:
        raise BadRequest("\n".join(dict.fromkeys(faults)))
    return found


def _fields(field: str, plain: dict[str, Any]) -> list[str]:
    """The field; of a list of data sets, that of each where none is named by its number."""
    block, _, rest = field.partition(".")
    sets = plain["data"]
    if block != "data" or not rest or not isinstance(sets, list) or rest.split(".")[0].isdecimal():
        return [field]
    return [f"data.{at}.{rest}" for at in range(len(sets))]


def _preflight(runs: Sequence[Run]) -> None:
    """Looks at the facts of all points that are not finished; a fault that all of them share is told once."""
    faults: dict[str, list[str]] = {}
    left = [r for r in runs if not (r.folder / LAST / DONE).is_file()]
    for one in left:
        try:
            pipeline.preflight(one.recipe)
        except BadRequest as error:
            for line in str(error).splitlines():
                faults.setdefault(line, []).append(one.name)
    if faults:
        told = [f if len(at) == len(left) else f"{', '.join(at)}: {f}" for f, at in faults.items()]
        raise BadRequest("\n".join(told))


@contextmanager
def _named(one: Run, asked: Sequence[str]) -> Iterator[None]:
    """Says at which point something failed and, where a stage is to be made again, which command has `--redo`.

    Args:
        asked: the command of the base recipe's own run.
    """
    try:
        yield
    except HfsdError as error:
        told = "\n".join(f"{one.name}: {line}" for line in str(error).splitlines())
        if "--redo" in told and "hfsd run" not in told:
            own = [part for line in one.sets for part in ("--set", line)]
            command = shlex.join([*asked, *own, "--out", str(one.folder), "--until", LAST])
            told += f"; a sweep has no --redo, the point's own run has: {command} --redo STAGE"
        raise type(error)(told) from error
    except Exception as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        raise HfsdError(f"{one.name}: {why}; --debug shows where") from error


def _take(one: Run, sources: Sequence[Path]) -> None:
    """Takes over the finished stages of other runs that this point would make again."""
    with lock(one.folder):
        taken = {}
        for step in up_to(steps(one.recipe, one.folder), LAST):
            if step.stage.is_done():
                continue
            source = next((s for s in sources if s != one.folder and _has(s, step)), None)
            if source is not None:
                _copy(step.stage, source / step.stage.name)
                append_log(one.folder, f"{step.stage.name} is taken from {source}, key {step.stage.key}")
                taken[step.stage.name] = source
        if taken:
            pipeline.write_recipe(*pipeline.read(one.recipe, None), one.folder)
            write_manifest(one.folder)
    for source in dict.fromkeys(taken.values()):
        _say(f"taken from {source}: {', '.join(name for name, s in taken.items() if s == source)}")


def _has(source: Path, step: Step) -> bool:
    """Whether another run has finished this very stage, and its outputs stand."""
    stage = dataclasses.replace(step.stage, path=source / step.stage.name)
    marker = stage.path / DONE
    return marker.is_file() and read_json(marker)["key"] == stage.key and stage.is_done()


def _copy(stage: Stage, source: Path) -> None:
    """A finished stage in another run: there as a whole or not at all.

    Weights are hard-linked, since no stage writes into a finished file and redoing one removes it first. All else is
    copied: it is small, and a page or a log may well be edited in place.
    """
    with new_folder(stage.path) as target:
        for name in read_json(source / DONE)["outputs"]:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            (link_or_copy if name.endswith(WEIGHTS) else shutil.copy2)(source / name, target / name)
        shutil.copy2(source / DONE, target / DONE)


def _gathered(base: Recipe, root: Path, found: dict[str, list[Run]]) -> SweepResult:
    made = {r.folder: pipeline.results(r.folder) for r in _distinct(found)}
    drawn = [
        Curve(field, [_point(r, field, made[r.folder]) for r in points], f"{quote(field, safe='')}.png")
        for field, points in found.items()
    ]
    return SweepResult(base.name, next(iter(made.values())).original.repo, str(root), drawn)


def _point(one: Run, field: str, results: Results) -> Point:
    tasks, sets = counted(results), results.train_sets
    there = [sets[d.label].rows for d in one.recipe.data if sets[d.label].rows < d.rows]
    note = f"only {', '.join(map(str, there))} there" if there and field == "data.rows" else ""
    return Point(
        value=one.value,
        folder=one.folder.name,
        rows=sum(s.trained_rows for s in sets.values()),
        removed=len(results.plan.removed),
        n_layers=results.plan.n_layers,
        asked=f"mean of {plural(len(tasks), 'task')}, {at_n(tasks)} each" if tasks else "no task counts",
        marks=[Mark(v.variant, v.mean, v.recovery) for v in results.variants],
        note=note,
        setups=setups(results),
    )


def _say(line: str) -> None:
    if processes.rank() == 0:
        print(f"sweep: {line}", file=sys.stderr)
