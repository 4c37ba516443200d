"""Scores of a variant by lm-eval: running its tasks, and writing what they found.

With `lm` and `served` behind it and `harness` beside it, the only module that uses lm-eval, and it imports it inside
functions: a help text costs neither lm-eval nor torch.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy

from hfsd import documents, processes, stats
from hfsd.errors import BadRequest, HfsdError
from hfsd.findings import EvalRow, Setup
from hfsd.harness import Tasks, Unit, quiet, seed_all
from hfsd.plain import from_json, to_json
from hfsd.recipe import Evaluate as EvaluateRecipe
from hfsd.records import Variant
from hfsd.rundir import write_atomic
from hfsd.taskfiles import Local

PARTS = ("results", "configs", "versions", "n-shot", "n-samples", "higher_is_better")  # of lm-eval's result
GUESSABLE = ("acc", "acc_norm", "acc_bytes")  # metrics for which one of the choices is picked
# How many tokens of a text to score lm-eval's classes keep, over `max_length`; ours only predicts the last one.
BEYOND = {"transformers": 1, "vllm": -1, "endpoint": 0}
NEW_TOKENS = 256  # lm-eval's own number, where a task that generates names none
ADDED = 8  # tokens that a tokenizer may put around a text, whose others have a byte at least


def run(
    backend: Callable[[], Any], tokenizer: Any, variant: Variant, tasks: Tasks, out: Path, say: bool = True
) -> list[EvalRow]:
    """Evaluates one variant on the recipe's tasks.

    All tasks are loaded before the model is: what is missing is told before hours of work. Each task ends with a line
    on stdout and two files in `out`, each whole or not there. TASK.docs.jsonl has a line per document and filter:
    `task`, `id`, `hash`, `filter`, `metrics` (as the task computes them: a number, or [sum, weight] where it divides
    sums, such as [nats, bytes]) and `responses` (log-likelihoods in nats, or texts). TASK.json, written last, has the
    rows and lm-eval's own results. A task that has it is not run again. Of several processes, each answers its share
    of the documents, and the first one writes.

    Args:
        backend: makes lm-eval's model, once, when a task is to be run.
        tokenizer: the variant's; with its chat template, if it has one, unless the recipe says otherwise.
        variant: what the rows are labelled with.
        tasks: the recipe's tasks; it keeps what it loads for the next variant.
        out: folder of this variant's results.
        say: print a line as each task ends.

    Returns:
        The rows in the recipe's order of tasks, and in each task in lm-eval's order of metrics; no rows on other
        processes than the first. A group that defines an aggregate (such as mmlu) gives the row of the aggregate;
        other groups, and tags, give the rows of their tasks, as does a group whose tasks differ in shots or metrics.

    Raises:
        BadRequest: a task cannot be asked (`harness.Tasks.load`), or there is no chat template where one is asked for.
        HfsdError: a task failed; tasks that ended before it are kept.
    """
    setup = _setup(tasks.recipe, tokenizer, variant)
    finished = processes.same(lambda: [all(_read(out, n) for n in unit.names) for unit in tasks.units])
    left = [unit for unit, done in zip(tasks.units, finished, strict=True) if not done]
    tasks.load(left)
    lm = functools.cache(backend)
    rows: list[EvalRow] = []
    engine = tasks.recipe.engine
    for unit in tasks.units:
        if unit in left:
            # the other engines have no line of ours, and vLLM divides by its bar's time
            with _one_line(unit.names, variant, engine), quiet(bars=engine == "transformers"):
                found = _run_unit(lm, unit, tasks, variant, setup, out, say)
        else:
            found = [row for name in unit.names for row in _read(out, name)]
        rows += found
    return rows if processes.rank() == 0 else []


def in_process(model: Any, tokenizer: Any, batch_tokens: int) -> Any:
    """lm-eval's model of one in memory (a causal language model, or a PEFT model with its adapter active)."""
    from hfsd.lm import SharedContextLM

    return SharedContextLM(model, copy.deepcopy(tokenizer), batch_tokens)


def _setup(recipe: EvaluateRecipe, tokenizer: Any, variant: Variant) -> Setup:
    """How all tasks are asked, with what the recipe leaves open."""
    has = bool(getattr(tokenizer, "chat_template", None))
    templated = has if recipe.chat_template is None else recipe.chat_template
    multiturn = templated if recipe.multiturn is None else recipe.multiturn
    if (templated or multiturn) and not has:
        field = "chat_template" if templated else "multiturn"
        raise BadRequest(
            f"evaluate.{field}: the tokenizer of {variant.id} has no chat template; leave {field} out, or save a "
            "template with the tokenizer"
        )
    return Setup(
        limit=recipe.limit,
        seed=recipe.seed,
        chat_template=templated,
        multiturn=multiturn and templated,
        fewshot=recipe.fewshot,
        engine=recipe.engine,
    )


def _run_unit(
    lm: Callable[[], Any], unit: Unit, tasks: Tasks, variant: Variant, setup: Setup, out: Path, say: bool
) -> list[EvalRow]:
    """Evaluates what is left of a unit; a group is finished task by task: MMLU alone has 57."""
    loaded = tasks.of(unit)
    finished = processes.same(lambda: [name for name in loaded.tasks if _read(out, name)])
    whole = [loaded.tasks]  # several names share their questions
    passes = whole if len(unit.names) > 1 else [{n: t} for n, t in loaded.tasks.items() if n not in finished]
    for part in passes:
        seed_all(setup.seed)
        _finish(lm(), part, variant, dataclasses.replace(setup, limit=unit.limit), loaded.local, out, say)
    if processes.rank():
        return []
    top = loaded.groups.get(unit.names[0])
    if top is not None and top.has_aggregation:
        if rows := _aggregate(top, out):
            _say(rows, say)
            return rows
        if say:
            print(f"{variant.id}: {top.name}: its tasks differ in metrics or shots, so each counts alone", flush=True)
    return [row for name in loaded.tasks for row in _read(out, name)]


def _finish(
    lm: Any,
    tasks: Mapping[str, Any],
    variant: Variant,
    setup: Setup,
    local: Mapping[str, Local],
    out: Path,
    say: bool,
) -> None:
    """Evaluates tasks in one pass and writes their files."""
    from lm_eval import evaluate
    from lm_eval.utils import hash_string

    result: Any = evaluate(
        lm,
        {"tasks": dict(tasks)},
        limit=setup.limit,
        apply_chat_template=setup.chat_template,
        fewshot_as_multiturn=setup.multiturn,
    )
    for task in tasks.values():
        task._instances = None  # tasks are kept for the next variant, their requests are not
    if processes.rank():
        return
    for name in tasks:
        samples = sorted(result["samples"][name], key=lambda s: (s["doc_id"], s["filter"]))
        if not samples:
            raise HfsdError(f"{name}: no documents were evaluated")
        own = local.get(name, Local(""))
        requests = {s["doc_id"]: s["arguments"] for s in samples}
        cut = sum(any(_cut(lm, one, setup.engine) for one in ones) for ones in requests.values())
        asked = dataclasses.replace(setup, data=own.text, comparable=own.comparable, truncated=cut)
        raw = {part: result[part][name] for part in PARTS}
        raw["configs"] = _portable(raw["configs"])
        raw["task_hash"] = hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
        raw |= {"setup": to_json(asked), "data": own.files}
        lines = [documents.line(variant.id, name, sample) for sample in samples]
        rows = _rows(name, raw, samples, variant, asked)
        _write(out, name, lines, rows, raw)
        _say(rows, say)


def _say(rows: Sequence[EvalRow], say: bool) -> None:
    """One line of a task's scores with their 95% intervals, as it ends."""
    if not say or not rows:
        return
    filters = {row.filter for row in rows}
    parts = []
    for row in rows:
        share = stats.is_share(row.metric, row.chance, row.higher_is_better)
        low, high = (None if bound is None else _number(bound, share) for bound in stats.interval(row))
        bounds = "no interval" if low is None else f"{low} to {high}"
        name = f"{row.metric} ({row.filter})" if len(filters) > 1 else row.metric
        parts.append(f"{name} {_number(row.value, share)}{'%' if share else ''} [{bounds}]")
    print(f"{rows[0].variant.id}: {rows[0].task}: {', '.join(parts)}, n = {rows[0].n}", flush=True)


def _number(value: float, share: bool) -> str:
    return f"{100 * value:.1f}" if share else f"{value:.3f}"


def _rows(
    name: str, raw: Mapping[str, Any], samples: Sequence[Mapping[str, Any]], variant: Variant, setup: Setup
) -> list[EvalRow]:
    """One row per metric and filter of a task."""
    rows = []
    for key, value in raw["results"].items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        values = [s[metric] for s in samples if s["filter"] == filter_name and metric in s]
        stderr = raw["results"].get(f"{metric}_stderr,{filter_name}")
        if not isinstance(stderr, int | float):
            pairs = [(a / math.log(2), b) for a, b in values] if metric == "bits_per_byte" else []
            stderr = stats.ratio_stderr(pairs)
        if not math.isfinite(value):
            raise HfsdError(f"{name} on {variant.id}: {key} over all documents is {value}, which is no score")
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
            setup=setup,
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


def _cut(lm: Any, request: Sequence[Any], engine: str) -> bool:
    """Whether lm-eval leaves out the beginning of a request's text, since the model reads no more."""
    from lm_eval.models.utils import normalize_gen_kwargs

    text, *rest = request
    if not rest:
        return False  # a rolling text is read in several windows
    if isinstance(rest[0], str):
        text, most = text + rest[0], lm.max_length + BEYOND[engine]
    else:
        most = lm.max_length - normalize_gen_kwargs(rest[0], NEW_TOKENS)["max_gen_toks"]
    return len(text.encode()) + ADDED > most and len(lm.tok_encode(text)) > most


def _aggregate(group: Any, out: Path) -> list[EvalRow]:
    """The rows of a group that defines an aggregate, from its finished tasks, written like a task's.

    Only of what all of its tasks have; none, and nothing is written, where that is nothing or their shots differ.
    """
    names = [task.task_name for task in group.get_all_tasks()]
    parts = {name: json.loads((out / f"{_file(name)}.json").read_text(encoding="utf-8"))["lm_eval"] for name in names}
    results = group.aggregate({name: raw["results"] for name, raw in parts.items()})
    weighted = {asked.metric: asked.weight_by_size for asked in group.aggregate_metric_list}
    scored = [row for name in names for row in _read(out, name)]
    if len({row.shots for row in scored}) > 1:
        return []
    rows = []
    for key in (k for k in results if "," in k and "_stderr," not in k):
        metric, _, filter_name = key.partition(",")
        leaves = [r for r in scored if (r.metric, r.filter) == (metric, filter_name)]
        if len(leaves) < len(names):
            continue
        pooled = weighted[metric]
        sizes = [r.n if pooled else 1 for r in leaves]
        stderr = results.get(f"{metric}_stderr,{filter_name}")
        chances = [r.chance for r in leaves if r.chance is not None]
        local = [r.setup.data for r in leaves if r.setup.data]
        setup = dataclasses.replace(
            leaves[0].setup,
            data=f"local files for {len(local)} of {len(leaves)} tasks" if local else "",
            comparable=all(r.setup.comparable for r in leaves),
            truncated=sum(r.setup.truncated for r in leaves),
        )
        row = dataclasses.replace(
            leaves[0],
            task=group.name,
            version=group.version,
            value=float(results[key]),
            stderr=float(stderr) if isinstance(stderr, int | float) else None,
            n=sum(r.n for r in leaves),
            chance=float(numpy.average(chances, weights=sizes)) if len(chances) == len(leaves) else None,
            doc_file=f"{_file(group.name)}.docs.jsonl",
            setup=setup,
            pooled=pooled,
        )
        rows.append(row)
    if not rows:
        return []
    lines: list[Any] = []
    for name in names:
        with open(out / f"{_file(name)}.docs.jsonl", encoding="utf-8") as file:
            lines += [json.loads(line) for line in file]
    _write(out, group.name, lines, rows, {"results": results, "tasks": names})
    return rows


def _write(out: Path, name: str, lines: Sequence[Any], rows: Sequence[EvalRow], raw: Mapping[str, Any]) -> None:
    """The documents first: TASK.json says that the task is finished."""
    from lm_eval import __version__
    from lm_eval.utils import handle_non_serializable

    dump = functools.partial(json.dumps, default=handle_non_serializable, ensure_ascii=False, allow_nan=False)
    whole = {"rows": to_json(list(rows)), "lm_eval": {"lm_eval_version": __version__, **raw}}
    texts, text = [dump(line) + "\n" for line in lines], dump(whole, indent=2) + "\n"
    write_atomic(out / f"{_file(name)}.docs.jsonl", "".join(texts))
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
    return {**config, "metadata": {k: v for k, v in (config.get("metadata") or {}).items() if k != "config_source"}}


@contextmanager
def _one_line(names: Sequence[str], variant: Variant, engine: str) -> Iterator[None]:
    """Whatever fails inside lm-eval or the model, as one line; finished tasks stay."""
    try:
        yield
    except HfsdError:
        raise
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        hint = "finished tasks are kept; run again to go on"
        if engine == "endpoint":
            hint += "; the server has to answer /v1/completions with echo and logprobs, as vLLM's does"
        raise HfsdError(f"{', '.join(names)} on {variant.id} failed: {what}; {hint}") from error
