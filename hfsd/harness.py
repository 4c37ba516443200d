"""Which tasks lm-eval is to run, and how they are asked: suites, names, local data, shots.

lm-eval is imported inside functions: a help text or a check of a packaged suite costs neither it nor torch.
"""

from __future__ import annotations

import difflib
import functools
import glob
import importlib.util
import logging
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import processes, taskfiles
from hfsd.errors import BadRequest, HfsdError, nearest
from hfsd.recipe import Evaluate, TaskFiles
from hfsd.taskfiles import Local

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PACKAGED = Path(__file__).parent / "tasks"
# lm-eval's group `openllm` with its shots, but of TruthfulQA only MC2, which is what the leaderboard (v1) counts
OPENLLM = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5}
SUITES = {
    "demo": ("demo_match", "demo_rank", "demo_bpb"),
    "quick": ("arc_easy", "piqa", "gsm8k"),
    "openllm": tuple(OPENLLM),
}
QUICK_LIMITS = {"gsm8k": 100}  # documents: generation costs most of the suite's time


@dataclass(frozen=True)
class Unit:
    """What is evaluated in one pass: a task, group or tag, or the demo, whose tasks share their questions.

    `shots` and `limit` are None where the task's own number, and all its documents, are meant.
    """

    names: tuple[str, ...]
    shots: int | None
    limit: int | None


@dataclass(frozen=True)
class Loaded:
    """lm-eval's tasks of a unit by name, the groups among its names, and which of the tasks have local data."""

    tasks: dict[str, Any]
    groups: dict[str, Any] = field(default_factory=dict)
    local: dict[str, Local] = field(default_factory=dict)


class Tasks:
    """The tasks of a recipe, each loaded once for all variants.

    Args:
        docs: folder of the packaged tasks' documents, as `taskdata.write` leaves it.

    Raises:
        BadRequest: a task is not known, or asked for twice.
    """

    def __init__(self, recipe: Evaluate, docs: Path) -> None:
        if unknown := check_tasks(recipe.tasks):
            raise BadRequest("\n".join(f"evaluate.tasks: {fault}" for fault in unknown))
        self.recipe, self.units = recipe, units(recipe)
        self._docs = docs
        self._loaded: dict[Unit, Loaded] = {}

    def load(self, wanted: Sequence[Unit]) -> None:
        """Loads tasks with their data; what is loaded already stays.

        Raises:
            BadRequest: a line for every unit that cannot be asked: no data, no documents, too few rows for the shots.
        """
        faults = []
        for unit in wanted:
            if unit not in self._loaded:
                try:
                    self._loaded[unit] = self._load(unit)
                except HfsdError as error:
                    faults.append(str(error))
        names = [name for loaded in self._loaded.values() for name in loaded.tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            faults.append(
                f"evaluate.tasks: {', '.join(twice)}: part of several names that are asked for; leave some out"
            )
        if faults:
            raise BadRequest("\n".join(faults))

    def of(self, unit: Unit) -> Loaded:
        """A loaded unit, as if no other had run before it: some tasks shuffle, and samplers go on where they are."""
        loaded = self._loaded[unit]
        seed_all(self.recipe.seed)
        for task in loaded.tasks.values():
            task.set_fewshot_seed(seed=self.recipe.seed)
        return loaded

    def _load(self, unit: Unit) -> Loaded:
        packaged = unit.names[0] in SUITES["demo"]
        files = {name: TaskFiles(test=self._documents(name)) for name in unit.names} if packaged else {}
        files |= self.recipe.data
        manager = _manager(PACKAGED) if packaged else _manager_of(unit.names[0])
        with quiet(), taskfiles.in_place_of_data(unit.names, files):
            seed_all(self.recipe.seed)
            found = manager.load(list(unit.names))
            tasks, groups = found["tasks"], found.get("groups", {})
            made: dict[str, Any] = {}
            for name, task in tasks.items():
                with taskfiles.blamed(task, files):
                    shots = _shots(task, unit.shots)
                    task.set_config(key="num_fewshot", value=shots)
                    if name in self.recipe.data:
                        made[name] = taskfiles.divide(task, self.recipe.data[name], shots, unit.limit)
                    if shots and self.recipe.fewshot == "fixed":
                        _fix(name, task, shots)
                if processes.count() > 1:
                    task.build_all_requests = functools.partial(_build_own, task, task.build_all_requests)
        return Loaded(tasks, groups, made)

    def _documents(self, task: str) -> str:
        path = self._docs / f"{task}.jsonl"
        if not path.is_file() or not path.stat().st_size:
            raise BadRequest(f"{task}: no documents in {path}; build them from held-out problems first (hfsd.taskdata)")
        return str(path.resolve())


def suite(name: str) -> tuple[str, ...]:
    """The tasks of a packaged suite, or the name itself."""
    return SUITES.get(name, (name,))


def units(recipe: Evaluate) -> list[Unit]:
    """The passes of a recipe, in its order.

    Raises:
        BadRequest: a task is asked for twice.
    """
    made: list[Unit] = []
    for name in dict.fromkeys(recipe.tasks):
        for part in [suite(name)] if name == "demo" else [(task,) for task in suite(name)]:
            shots = OPENLLM[part[0]] if name == "openllm" else None
            limit = QUICK_LIMITS.get(part[0]) if name == "quick" else None
            made.append(
                Unit(part, shots if recipe.shots is None else recipe.shots, recipe.limit if recipe.limit else limit)
            )
    names = [name for unit in made for name in unit.names]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise BadRequest(f"evaluate.tasks: {', '.join(twice)}: asked for by name and in a suite; leave one of them out")
    return made


def faults(recipe: Evaluate, variants: Sequence[str]) -> list[str]:
    """What is wrong with a recipe's block by the facts: names of tasks, local files, servers of variants.

    Args:
        variants: the ids of the run's variants.
    """
    found = [f"evaluate.tasks: {fault}" for fault in check_tasks(recipe.tasks)]
    if not found:
        try:
            units(recipe)
        except BadRequest as error:
            found.append(str(error))
        found += [f"evaluate.data.{name}: {why}" for name in recipe.data if (why := _not_asked(name, recipe))]
    found += taskfiles.faults(recipe.data)
    return found + (_server_faults(recipe, variants) if recipe.engine == "endpoint" else [])


def check_tasks(names: Sequence[str]) -> list[str]:
    """One line per name that is no suite and no task, group or tag of lm-eval, with the nearest names.

    Packaged names, and tasks that have a file of their name, are answered without importing lm-eval: its index of all
    tasks takes 20 seconds to build.
    """
    packaged = {*SUITES, *(task for tasks in SUITES.values() for task in tasks)}
    others = [n for n in dict.fromkeys(names) if n not in packaged and not _folder_of(n)]
    if not others:
        return []
    known = {*packaged, *_manager().all_tasks}
    return [f"no suite, task or group '{n}'{_nearest(n, known)}" for n in others if n not in known]


def bits_of_solution(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """`process_results` of demo_bpb: the solution's log-likelihood (nats) and its UTF-8 bytes, which lm-eval's
    `bits_per_byte` sums over all documents before it divides."""
    return {"bits_per_byte": (results[0][0], len(doc["choices"][0].encode("utf-8")))}


def seed_all(seed: int) -> None:
    """Seeds every generator that a task may draw from."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Without lm-eval's remarks and, with `bars`, its bars; where ours is the one line of progress."""
    import tqdm

    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.tqdm.__init__
    logger.setLevel(logging.ERROR)
    if bars:
        tqdm.tqdm.__init__ = functools.partialmethod(start, disable=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = start  # type: ignore[method-assign]
        logger.setLevel(level)


def _shots(task: Any, asked: int | None) -> int:
    own = task.get_config("num_fewshot")
    return own or 0 if asked is None or own == 0 else asked  # lm-eval's own rule: what a task sets to 0 stays 0


def _fix(name: str, task: Any, shots: int) -> None:
    """The first shots of the pool for every question; one more stands in where a question is among them."""
    from lm_eval.api.samplers import FirstNSampler

    if not hasattr(task, "sampler"):
        raise BadRequest(
            f"evaluate.fewshot: {name} draws its shots by code of its own; it cannot be asked with `fixed`"
        )
    pool: list[Any] = []
    for doc in task.sampler.fewshot_docs():
        if doc not in pool:
            pool.append(doc)
        if len(pool) > shots:
            break
    if len(pool) < shots:
        raise BadRequest(f"evaluate.fewshot: {name} has {len(pool)} different shots, and {shots} are asked for")
    task.sampler = FirstNSampler(pool)
    task.fewshot_cfg.split = task.config.test_split  # by which lm-eval tells the sampler which question it is


def _build_own(task: Any, build: Any, *, rank: int, world_size: int, **options: Any) -> None:
    """This process's requests, with the shots that one process alone would draw: those of all documents in order."""
    build(rank=0, world_size=1, **options)
    task._instances = [i for i in task._instances if i.doc_id % world_size == rank]
    if not task._instances:
        raise BadRequest(
            f"{task.task_name}: fewer documents than the {world_size} processes; use fewer, or raise limit"
        )


def _not_asked(name: str, recipe: Evaluate) -> str:
    """Why local data of this name serves nothing; empty where it does."""
    asked = {task for given in recipe.tasks for task in suite(given)}
    if name in asked and _is_task(name):
        return ""
    known = {leaf for task in asked for leaf in _members(task)}
    if name in known:
        return ""
    if name in asked:
        return f"is a group; give the files of its tasks, such as {min(known)}"
    return f"is not evaluated{nearest(name, known)}; evaluate.tasks has {', '.join(recipe.tasks)}"


def _server_faults(recipe: Evaluate, variants: Sequence[str]) -> list[str]:
    given, found = recipe.endpoint, []
    for name in given:
        if name not in variants:
            found.append(
                f"evaluate.endpoint.{name}: no such variant{nearest(name, variants)}; there are {', '.join(variants)}"
            )
    if missing := [v for v in variants if v not in given]:
        found.append(f"evaluate.endpoint: no server for {', '.join(missing)}; each variant needs one")
    taken: dict[tuple[str, str | None], str] = {}
    for name, server in given.items():
        other = taken.setdefault((server.url.rstrip("/"), server.model), name)
        if other != name:
            found.append(
                f"evaluate.endpoint.{name}: the server and the model of {other}; each variant is another model"
            )
    return found


def _is_task(name: str) -> bool:
    """Whether a name is known as a single task's without lm-eval's index."""
    return name in SUITES["demo"] or _folder_of(name) is not None


def _members(name: str) -> set[str]:
    """The tasks that a task, group or tag stands for."""
    if _is_task(name):
        return {name}
    from lm_eval.tasks._index import Kind

    index = _manager().task_index
    if name not in index or index[name].kind in (Kind.TASK, Kind.PY_TASK):
        return {name}
    if index[name].kind is Kind.TAG:
        return set(index[name].tags)
    parts: list[Any] = list((index[name].cfg or {}).get("task") or [])
    found: set[str] = set()
    for part in parts:
        if isinstance(part, str):
            found |= _members(part)
        elif isinstance(part.get("task"), list):
            parts += part["task"]
        else:
            found |= _members(part.get("task") or part["group"])
    return found


def _manager_of(name: str) -> TaskManager:
    """lm-eval's index of the folder that holds this task, or of all its folders, which takes much longer."""
    folder = _folder_of(name)
    return _manager(folder) if folder else _manager()


@functools.cache
def _manager(folder: Path | None = None) -> TaskManager:
    from lm_eval.tasks import TaskManager

    with quiet():
        return TaskManager() if folder is None else TaskManager(include_path=folder, include_defaults=False)


@functools.cache
def _folder_of(name: str) -> Path | None:
    """lm-eval's folder with a file NAME.yaml that defines a task of that name."""
    package = importlib.util.find_spec("lm_eval")
    folders = (package.submodule_search_locations or []) if package else []
    files = (file for folder in folders for file in Path(folder, "tasks").rglob(f"{glob.escape(name)}.yaml"))
    defines = re.compile(rf"^[\"']?task[\"']?: [\"']?{re.escape(name)}[\"']?$", re.M)
    return next((file.parent for file in files if defines.search(file.read_text("utf-8"))), None)


def _nearest(word: str, known: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f" (nearest: {', '.join(close)})" if close else "; `lm-eval ls tasks` lists all"
