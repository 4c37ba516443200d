"""Scores of a variant by lm-eval: any of its tasks and groups, and the packaged suites.

With `lm` behind it, the only module that uses lm-eval, and it imports it inside functions: a help text or a check of a
packaged suite costs neither lm-eval nor torch.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import functools
import glob
import importlib.util
import json
import logging
import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd.errors import BadRequest, HfsdError
from hfsd.plain import from_json, to_json
from hfsd.recipe import Evaluate as EvaluateRecipe
from hfsd.records import EvalRow, Variant
from hfsd.rundir import write_atomic

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

PACKAGED = Path(__file__).parent / "tasks"
# lm-eval's group `openllm` with its shots, but of TruthfulQA only MC2, which is what the leaderboard (v1) counts
OPENLLM = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5}
SUITES = {"demo": ("demo_match", "demo_rank", "demo_bpb"), "openllm": tuple(OPENLLM)}
PARTS = ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better")  # of lm-eval's result
ABSENT = ("ConnectionError", "OfflineModeIsEnabled", "DatasetNotFoundError", "ProxyError")  # data sets' errors
GUESSABLE = ("acc", "acc_norm", "acc_bytes")  # metrics for which one of the choices is picked


def suite(name: str) -> tuple[str, ...]:
    """The tasks of a packaged suite, or the name itself."""
    return SUITES.get(name, (name,))


def check_tasks(names: Sequence[str]) -> list[str]:
    """One line per name that is no suite and no task, group or tag of lm-eval, with the nearest names.

    Packaged names, and tasks that have a file of their name, are answered without importing lm-eval: its index of tasks
    takes 20 seconds to build.
    """
    packaged = {*SUITES, *SUITES["demo"], *SUITES["openllm"]}
    others = [n for n in dict.fromkeys(names) if n not in packaged and not _has_file(n)]
    if not others:
        return []
    known = {*packaged, *_manager().all_tasks}
    return [f"no suite, task or group '{n}'{_nearest(n, known)}" for n in others if n not in known]


def bits_of_solution(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """`process_results` of demo_bpb: the solution's log-likelihood (nats) and its UTF-8 bytes, which lm-eval's
    `bits_per_byte` sums over all documents before it divides."""
    return {"bits_per_byte": (results[0][0], len(doc["choices"][0].encode("utf-8")))}


def run(model: Any, tokenizer: Any, variant: Variant, recipe: EvaluateRecipe, docs: Path, out: Path) -> list[EvalRow]:
    """Evaluates one variant on the recipe's tasks; the prompt is in the tokenizer's chat template, if it has one.

    Each task ends with two files in `out`, each whole or not there. TASK.docs.jsonl has a line per document and
    filter: `task`, `id`, `hash`, `filter`, `metrics` (as the task computes them: a number, or [sum, weight] where it
    divides sums, such as [nats, bytes]) and `responses` (log-likelihoods in nats, or texts). TASK.json, written last,
    has the rows and lm-eval's own results. A task that has it is not run again.

    Args:
        model: a causal language model in memory, or a PEFT model with its adapter active.
        tokenizer: its tokenizer; a copy of it is used.
        variant: what the rows are labelled with.
        recipe: tasks, limit (documents per task), shots, seed, tokens per batch.
        docs: folder of the packaged tasks' documents, as `taskdata.write` leaves it.
        out: folder of this variant's results.

    Returns:
        The rows in the recipe's order of tasks, and in each task in lm-eval's order of metrics. A group that defines an
        aggregate (such as mmlu) gives the row of the aggregate; other groups give the rows of their tasks.

    Raises:
        BadRequest: an unknown task, or a packaged task without documents.
        HfsdError: a task failed; tasks that ended before it are kept.
    """
    if faults := check_tasks(recipe.tasks):
        raise BadRequest("\n".join(f"evaluate.tasks: {fault}" for fault in faults))
    rows: list[EvalRow] = []
    lm = functools.cache(lambda: _backend(model, tokenizer, recipe.batch_tokens))
    for names, shots in _units(recipe):
        finished = [_read(out, name) for name in names]
        if all(finished):
            rows += [row for task in finished for row in task]
            continue
        with _one_line(names, variant), _quiet():
            _seed(recipe.seed)  # some tasks shuffle: a result must not depend on which task ran before it
            tasks, groups = _load(names, docs)
            for task in tasks.values():
                _prepare(task, shots, recipe.seed)
            if len(names) > 1:
                _finish(lm(), tasks, variant, recipe, out)
            for name, task in tasks.items():  # a group is finished task by task: MMLU alone has 57
                if not _read(out, name):
                    _finish(lm(), {name: task}, variant, recipe, out)
            top = groups.get(names[0])
            whole = top is not None and top.has_aggregation
            rows += _aggregate(top, out) if whole else [row for name in tasks for row in _read(out, name)]
    return rows


def _units(recipe: EvaluateRecipe) -> list[tuple[tuple[str, ...], int | None]]:
    """What is evaluated in one pass, and its shots: a task or group, or the demo, whose tasks share their questions."""
    units: list[tuple[tuple[str, ...], int | None]] = []
    for name in dict.fromkeys(recipe.tasks):
        for part in [suite(name)] if name == "demo" else [(task,) for task in suite(name)]:
            suites = OPENLLM[part[0]] if name == "openllm" else None
            units.append((part, suites if recipe.shots is None else recipe.shots))
    names = [name for part, _ in units for name in part]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise BadRequest(f"evaluate.tasks: {', '.join(twice)}: asked for by name and in a suite; leave one of them out")
    return units


def _load(names: Sequence[str], docs: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """lm-eval's tasks and groups of these names, with their data."""
    if names[0] not in SUITES["demo"]:
        loaded = _manager().load(list(names))
        return loaded["tasks"], loaded.get("groups", {})
    # lm-eval lays changes over a known task only inside a group
    parts = [{"task": n, "dataset_kwargs": {"data_files": {"test": _documents(docs, n)}}} for n in names]
    return _manager(packaged=True).load([{"group": "packaged", "task": parts}])["tasks"], {}


def _prepare(task: Any, shots: int | None, seed: int) -> None:
    own = task.get_config("num_fewshot")
    # lm-eval's own rule: what a task sets to 0 stays 0
    task.set_config(key="num_fewshot", value=own or 0 if shots is None or own == 0 else shots)
    task.set_fewshot_seed(seed=seed)


def _documents(docs: Path, task: str) -> str:
    path = docs / f"{task}.jsonl"
    if not path.is_file() or not path.stat().st_size:
        raise BadRequest(f"{task}: no documents in {path}; build them from held-out problems first (hfsd.taskdata)")
    return str(path.resolve())


def _finish(lm: Any, tasks: Mapping[str, Any], variant: Variant, recipe: EvaluateRecipe, out: Path) -> None:
    """Evaluates tasks in one pass and writes their files."""
    from lm_eval import evaluate
    from lm_eval.utils import hash_string

    _seed(recipe.seed)
    templated = bool(getattr(lm.tokenizer, "chat_template", None))
    result: Any = evaluate(
        lm, {"tasks": dict(tasks)}, limit=recipe.limit, apply_chat_template=templated, fewshot_as_multiturn=templated
    )
    for name in tasks:
        samples = sorted(result["samples"][name], key=lambda s: (s["doc_id"], s["filter"]))
        if not samples:
            raise HfsdError(f"{name}: no documents were evaluated")
        raw = {part: result[part][name] for part in PARTS}
        raw["configs"] = _portable(raw["configs"])
        raw["task_hash"] = hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        raw |= {"chat_template": templated, "limit": recipe.limit, "fewshot_seed": recipe.seed}
        lines = [_document(name, sample) for sample in samples]
        _write(out, name, lines, _rows(name, raw, samples, variant), raw)


def _rows(name: str, raw: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], variant: Variant) -> list[EvalRow]:
    """One row per metric and filter of a task."""
    rows = []
    for key, value in raw["results"].items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        values = [s[metric] for s in samples if s["filter"] == filter_name and metric in s]
        stderr = raw["results"].get(f"{metric}_stderr,{filter_name}")
        if not isinstance(stderr, int | float):
            stderr = _ratio_stderr([(a / math.log(2), b) for a, b in values]) if metric == "bits_per_byte" else None
        row = EvalRow(
            variant=variant,
            task=name,
            version=str(raw["versions"]),
            metric=metric,
            filter=filter_name,
            shots=int(raw["n-shot"]),
            value=float(value),
            stderr=None if stderr is None else float(stderr),
            n=len(values),
            chance=_chance(raw["configs"], metric, samples),
            higher_is_better=bool(raw["higher_is_better"].get(metric, True)),
            doc_file=f"{_file(name)}.docs.jsonl",
        )
        rows.append(row)
    return rows


def _chance(config: Mapping[str, Any], metric: str, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """The score of guessing: 1 / choices, averaged over documents; 0 for a text that has to match; None elsewhere."""
    if config.get("output_type") == "generate_until" and metric == "exact_match":
        return 0.0
    if config.get("output_type") != "multiple_choice" or metric not in GUESSABLE:
        return None
    shares = []
    for sample in samples:
        # TruthfulQA MC2 scores the probability of all true answers: guessing gives it their share
        truths = sample["doc"].get("mc2_targets", {}).get("labels") or [1]
        several = "mc2" in config["task"]
        shares.append((sum(truths) if several else 1) / len(sample["arguments"]))
    return math.fsum(shares) / len(shares)


def _ratio_stderr(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Standard error of sum(a) / sum(b) over documents (Cochran, Sampling Techniques, 3rd ed., section 6.3)."""
    n, total = len(pairs), math.fsum(b for _, b in pairs)
    if n < 2:
        return None
    ratio = math.fsum(a for a, _ in pairs) / total
    return math.sqrt(n / (n - 1) * math.fsum((a - ratio * b) ** 2 for a, b in pairs)) / total


def _document(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    responses = [r[0] if isinstance(r, list | tuple) else r for r in sample["filtered_resps"]]
    return {
        "task": task,
        "id": str(sample["doc"].get("id", sample["doc_id"])),
        "hash": sample["doc_hash"],
        "filter": sample["filter"],
        "metrics": {name: sample[name] for name in sample["metrics"]},
        "responses": responses,
    }


def _aggregate(group: Any, out: Path) -> list[EvalRow]:
    """The rows of a group that defines an aggregate, from its finished tasks, written like a task's."""
    names = [task.task_name for task in group.get_all_tasks()]
    parts = {name: json.loads((out / f"{_file(name)}.json").read_text(encoding="utf-8"))["lm_eval"] for name in names}
    results = group.aggregate({name: raw["results"] for name, raw in parts.items()})
    rows = []
    for key in (k for k in results if "," in k and "_stderr," not in k):
        metric, _, filter_name = key.partition(",")
        leaves = [r for n in names for r in _read(out, n) if (r.metric, r.filter) == (metric, filter_name)]
        n = sum(r.n for r in leaves)
        stderr = results.get(f"{metric}_stderr,{filter_name}")
        chances = [r.chance * r.n for r in leaves if r.chance is not None]
        row = dataclasses.replace(
            leaves[0],
            task=group.name,
            version=group.version,
            value=float(results[key]),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            n=n,
            chance=math.fsum(chances) / n if len(chances) == len(leaves) else None,
            doc_file=f"{_file(group.name)}.docs.jsonl",
        )
        rows.append(row)
    documents: list[Any] = []
    for name in names:
        with open(out / f"{_file(name)}.docs.jsonl", encoding="utf-8") as lines:
            documents += [json.loads(line) for line in lines]
    _write(out, group.name, documents, rows, {"results": results, "tasks": names})
    return rows


def _write(out: Path, name: str, documents: Sequence[Any], rows: Sequence[EvalRow], raw: Mapping[str, Any]) -> None:
    """The documents first: TASK.json says that the task is finished."""
    from lm_eval import __version__
    from lm_eval.utils import handle_non_serializable

    dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False, allow_nan=False)
    whole = {"rows": to_json(list(rows)), "lm_eval": {"lm_eval_version": __version__, **raw}}
    lines, text = [dump(d) + "\n" for d in documents], dump(whole, indent=2) + "\n"
    write_atomic(out / f"{_file(name)}.docs.jsonl", "".join(lines))
    write_atomic(out / f"{_file(name)}.json", text)


def _read(out: Path, name: str) -> list[EvalRow]:
    """The rows of a finished task; empty if it is not finished."""
    path = out / f"{_file(name)}.json"
    if not path.is_file():
        return []
    return [from_json(EvalRow, row) for row in json.loads(path.read_text(encoding="utf-8"))["rows"]]


def _file(task: str) -> str:
    return re.sub(r"[^\w.-]", "_", task)


def _portable(config: dict[str, Any]) -> dict[str, Any]:
    """A task's config without this machine's paths."""
    config = {**config, "metadata": {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}}
    if files := (config.get("dataset_kwargs") or {}).get("data_files"):
        config["dataset_kwargs"] = {"data_files": {split: Path(file).name for split, file in dict(files).items()}}
    return config


def _backend(model: Any, tokenizer: Any, batch_tokens: int) -> Any:
    from hfsd.lm import SharedContextLM

    return SharedContextLM(model, copy.deepcopy(tokenizer), batch_tokens)


@functools.cache
def _manager(packaged: bool = False) -> TaskManager:
    from lm_eval.tasks import TaskManager

    with _quiet():
        return TaskManager(include_path=PACKAGED, include_defaults=False) if packaged else TaskManager()


def _has_file(name: str) -> bool:
    """Whether lm-eval has a file NAME.yaml that defines a task or group of that name."""
    package = importlib.util.find_spec("lm_eval")
    folders = (package.submodule_search_locations or []) if package else []
    files = (file for folder in folders for file in Path(folder, "tasks").rglob(f"{glob.escape(name)}.yaml"))
    return any(re.search(rf"^(task|group): {re.escape(name)}$", file.read_text("utf-8"), re.M) for file in files)


def _nearest(word: str, known: Sequence[str] | set[str]) -> str:
    close = difflib.get_close_matches(word, sorted(known), n=3, cutoff=0.6)
    return f" (nearest: {', '.join(close)})" if close else "; `lm-eval ls tasks` lists all"


def _seed(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks and bars; ours is the one line of progress."""
    import tqdm

    logger = logging.getLogger("lm_eval")
    level, start = logger.level, tqdm.tqdm.__init__
    logger.setLevel(logging.ERROR)
    tqdm.tqdm.__init__ = functools.partialmethod(start, disable=True)  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.tqdm.__init__ = start  # type: ignore[method-assign]
        logger.setLevel(level)


@contextmanager
def _one_line(names: Sequence[str], variant: Variant) -> Iterator[None]:
    """Whatever fails inside lm-eval, a data set or the model, as one line; finished tasks stay."""
    try:
        yield
    except HfsdError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        hint = "finished tasks are kept; run again to go on"
        if type(error).__name__ in ABSENT:
            hint = "its data is not in the cache and cannot be fetched; the suite `demo` needs no network"
        raise HfsdError(f"{', '.join(names)} on {variant.id} failed: {what}; {hint}") from error
