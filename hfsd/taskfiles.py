"""Local files in the place of a stock task's data, and of nothing else; what is said where a task's data is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hfsd.errors import BadRequest, HfsdError
from hfsd.recipe import TaskFiles
from hfsd.rundir import sha256

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # suffix -> datasets' builder
ENDINGS = "/".join(BUILDERS)
SHARE = 10  # one row in this many is kept for shots, where shots come from the evaluated file
SHOTS = "shots"  # the split that holds them
COLUMN = re.compile(r"\w+")


@dataclass(frozen=True)
class Local:
    """Which files stand in the place of a task's data: for people, and for TASK.json."""

    text: str
    comparable: bool = True
    files: dict[str, Any] = field(default_factory=dict)


def faults(given: Mapping[str, TaskFiles]) -> list[str]:
    """Files that are not there, or of no kind that can be read."""
    found = []
    for name, files in given.items():
        for kind, file in _files(files).items():
            if file.suffix not in BUILDERS:
                found.append(f"evaluate.data.{name}.{kind}: {file.name} is no {ENDINGS} file")
            elif not file.is_file():
                found.append(f"evaluate.data.{name}.{kind}: no file {file}")
    return found


def hashes(given: Mapping[str, TaskFiles]) -> dict[str, Any]:
    """What an evaluation depends on: names and bytes of the files, wherever they lie."""
    return {
        name: {k: {"file": f.name, "sha256": sha256(f)} for k, f in _files(files).items() if f.is_file()}
        for name, files in given.items()
    }


def count(task: str, files: TaskFiles) -> int:
    """Rows of the file that stands in the place of a task's evaluated ones.

    Raises:
        BadRequest: it cannot be read, or has no rows.
    """
    return len(_read(task, "test", _files(files)["test"]))


@contextmanager
def in_place_of_data(names: Sequence[str], given: Mapping[str, TaskFiles]) -> Iterator[None]:
    """While tasks are loaded: these take the rows of files, and where another's data is missing, one line says so.

    Args:
        names: of what is loaded, for messages.
        given: files by the task's name.

    Raises:
        BadRequest: a task's data cannot be had, a file does not fit its task, or lm-eval cannot load a task.
    """
    from lm_eval.api.task import ConfigurableTask

    build, own = ConfigurableTask.__init__, ConfigurableTask.download

    def init(self: Any, *args: Any, **options: Any) -> None:
        with blamed(self, given):
            build(self, *args, **options)

    def download(self: Any, dataset_kwargs: Any = None, **options: Any) -> None:
        name = self.config.task
        if name in given:
            self.dataset = _splits(self, given[name])
            return
        try:
            own(self, dataset_kwargs, **options)
        except Exception as error:
            raise BadRequest(_absent(self.config, error)) from error

    ConfigurableTask.__init__, ConfigurableTask.download = init, download  # type: ignore[method-assign]
    try:
        yield
    except HfsdError:
        raise
    except Exception as error:  # before there is a task to blame
        raise BadRequest(f"{', '.join(names)}: lm-eval cannot load it: {_brief(error)}") from error
    finally:
        ConfigurableTask.__init__, ConfigurableTask.download = build, own  # type: ignore[method-assign]


@contextmanager
def blamed(task: Any, given: Mapping[str, TaskFiles]) -> Iterator[None]:
    """What fails in the block is this task's, or its local file's, in one line.

    Raises:
        BadRequest: something failed.
    """
    try:
        yield
    except HfsdError:
        raise
    except Exception as error:
        if task.config is None:  # nothing of it is known
            raise
        raise BadRequest(_unfit(task, given, error)) from error


def divide(task: Any, files: TaskFiles, shots: int, limit: int | None) -> Local:
    """Keeps evaluated rows and shots apart in a task that has local data.

    Without a file of shots they come from rows of `test` that are not evaluated: with a limit from those behind the
    evaluated ones, where there are enough, else from the last tenth, or more where the shots need it.

    Raises:
        BadRequest: there are too few rows for the shots.
    """
    name = task.task_name
    recorded: dict[str, Any] = {k: {"file": f.name, "sha256": sha256(f)} for k, f in _files(files).items()}
    test, need = Path(files.test).name, shots + 1  # lm-eval may draw one more, in case the question is among them
    if not shots or (files.fewshot is None and task.fewshot_cfg.samples is not None):
        return Local(test, files={"test": recorded["test"]})
    if files.fewshot is None:
        split = _asked_split(task.config)
        rows = task.dataset[split]
        cut = min(limit or len(rows), len(rows))
        if len(rows) - cut < need:
            cut = len(rows) - max(len(rows) // SHARE, need)
        if cut < 1:
            raise BadRequest(
                f"evaluate.data.{name}.test: {test} has {len(rows)} rows, too few for {shots} shots from rows that are "
                f"not evaluated; give a file of shots: evaluate.data.{name}.fewshot"
            )
        task.dataset[SHOTS], task.dataset[split] = rows.select(range(cut, len(rows))), rows.select(range(cut))
        task.fewshot_cfg.split = SHOTS
        task.sampler.replace_df(list(task.fewshot_docs()))
        text = f"{test} rows [0, {cut}); shots from rows [{cut}, {len(rows)})"
        recorded["test"] |= {"rows": [0, cut], "shots": [cut, len(rows)]}
    else:
        text = f"{test}; shots from {Path(files.fewshot).name}"
    pool = task.sampler.fewshot_docs()
    if len(pool) < (need if task.fewshot_cfg.split == task.config.test_split else shots):
        source = "test" if files.fewshot is None else "fewshot"
        raise BadRequest(
            f"evaluate.data.{name}.{source}: {len(pool)} rows serve as shots, too few for {shots}; give more rows, or "
            "fewer evaluate.shots"
        )
    # its columns are seen now, and not at the first question
    task.doc_to_text(pool[0], task.fewshot_cfg.doc_to_text)
    task.doc_to_target(pool[0], task.fewshot_cfg.doc_to_target)
    return Local(text, files.fewshot is not None, recorded)


def _files(files: TaskFiles) -> dict[str, Path]:
    given = {"test": files.test, "fewshot": files.fewshot}
    return {kind: Path(file).expanduser() for kind, file in given.items() if file is not None}


def _splits(task: Any, files: TaskFiles) -> dict[str, Any]:
    """Every split that the task names: the evaluated one is `test`, any other holds the shots."""
    config, rows = task.config, {k: _read(task.config.task, k, f) for k, f in _files(files).items()}
    asked = _asked_split(config)
    if files.fewshot is not None:
        if task.fewshot_cfg.split is None and task.fewshot_cfg.samples is not None:
            raise BadRequest(f"evaluate.data.{config.task}.fewshot: the task brings its own shots; leave this file out")
        if (task.fewshot_cfg.split or config.training_split or config.validation_split or asked) == asked:
            task.fewshot_cfg.split = SHOTS  # its own shots are of the evaluated rows
    names = (config.training_split, config.validation_split, config.test_split, task.fewshot_cfg.split)
    shots = rows.get("fewshot", rows["test"])
    return {name: rows["test"] if name == asked else shots for name in names if name is not None}


def _asked_split(config: Any) -> str:
    return config.test_split or config.validation_split


def _read(task: str, kind: str, file: Path) -> Any:
    import datasets

    try:
        rows = datasets.load_dataset(BUILDERS[file.suffix], data_files={"rows": str(file)}, split="rows")
    except Exception as error:
        cause = error.__cause__ or error  # datasets wraps the parser's own words
        raise BadRequest(f"evaluate.data.{task}.{kind}: {file.name} cannot be read: {_brief(cause)}") from error
    if not len(rows):
        raise BadRequest(f"evaluate.data.{task}.{kind}: {file.name} has no rows")
    return rows


def _absent(config: Any, error: Exception) -> str:
    """What is said where a task's data cannot be had: which it is, and which file would serve."""
    name, splits = config.task, dict.fromkeys([_asked_split(config), config.fewshot_config.split])
    source = ", ".join([*([config.dataset_name] if config.dataset_name else []), *(s for s in splits if s)])
    reads = columns(config)
    with_columns = f" with the columns {', '.join(reads)}" if reads else " with its columns"
    return (
        f"{name}: its data set {config.dataset_path} ({source}) cannot be had: {_brief(error)[:200]}; fetch it once "
        f"with a network, or point to a local {ENDINGS} file{with_columns}: --set evaluate.data.{name}.test=FILE"
    )


def _unfit(task: Any, given: Mapping[str, TaskFiles], error: Exception) -> str:
    name = task.config.task
    empty = hasattr(task, "task_docs") and not len(task.task_docs)
    what = "it has no documents" if empty else _brief(error)
    if name not in given:
        return f"{name}: lm-eval cannot load it: {what}; choose other evaluate.tasks"
    has = {k: list(_read(name, k, f).features) for k, f in _files(given[name]).items()}
    reads = columns(task.config)
    kind = next((k for k in has if not set(reads) <= set(has[k])), "test")
    wanted = f", and the task reads {', '.join(reads)}" if reads else ""
    return (
        f"evaluate.data.{name}.{kind}: {_files(given[name])[kind].name} does not fit the task ({what}); its columns "
        f"are {', '.join(has[kind])}{wanted}"
    )


def columns(config: Any) -> list[str]:
    """The columns that a task's templates read; empty where code of its own reads them."""
    from jinja2 import Environment, meta

    if config.process_docs is not None:
        return []
    found: set[str] = set()
    for template in (config.doc_to_text, config.doc_to_choice, config.doc_to_target):
        if isinstance(template, str):
            plain = COLUMN.fullmatch(template)
            found |= {template} if plain else meta.find_undeclared_variables(Environment().parse(template))
        elif callable(template):
            return []
    return sorted(found)


def _brief(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
