"""How many tokens each step of a recipe computes: from the real rows where they are at hand, else from its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from hfsd import chat, compare, data, drafts, fetch, harness, models, settings, speed, taskfiles
from hfsd.blocks_cut import Data
from hfsd.harness import Unit
from hfsd.recipe import Recipe
from hfsd.records import TAUGHT, TEXTS, Example, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTED = 2000  # rows whose tokens are counted
PROMPTED = 50  # and those whose prompts for rewriting are
GENERATED = 256  # tokens of an answer, where a task does not say: lm-eval's default


@dataclass(frozen=True)
class Lengths:
    """Rows of a data set and their tokens. `source` says whether they were counted or are the recipe's bounds.

    `asked` are the tokens of a prompt for rewriting, by its mode. `held_out` is None where the rows are not here.
    """

    data: str
    rows: int
    prompt: float
    reference: float
    longest: int
    held_out: int | None
    source: str
    asked: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What a step computes with one model (`original` or `pruned`).

    `forward` and `trained` are tokens, `passes` are decoded tokens of up to `rows` rows at once. `bound` is True where
    answers are counted as long as they may be; `unknown` says why the work is not known.
    """

    step: str
    model: str
    forward: float = 0.0
    trained: float = 0.0
    passes: float = 0.0
    rows: int = 1
    bound: bool = False
    unknown: str = ""


@dataclass(frozen=True)
class Task:
    """A public task's size: documents, choices of each (0: a text is generated), and about how many tokens they have.

    `context` and `choice` are tokens of a question and of a choice or solution, counted with SmolLM2's tokenizer where
    the data were at hand (ARC, PIQA, GSM8K), else estimates. `shared`: all questions of a subject have the same shots,
    which are computed once. `head` is a fixed beginning.
    """

    documents: int
    choices: float
    context: float
    choice: float
    shared: bool = False
    head: float = 0.0


TASKS = {
    "arc_challenge": Task(1172, 4, 31, 6),
    "arc_easy": Task(2376, 4, 27, 4),
    "hellaswag": Task(10042, 4, 60, 30),
    "truthfulqa_mc2": Task(817, 7.2, 15, 14, head=190),
    "mmlu": Task(14042, 4, 100, 1, shared=True),
    "winogrande": Task(1267, 2, 20, 7),
    "piqa": Task(1838, 2, 14, 23),
    "gsm8k": Task(1319, 0, 66, 124),
}
OWN_SHOTS = {"gsm8k": 5}  # where neither the recipe nor a suite says; the others ask without


def lengths(recipe: Recipe) -> list[Lengths]:
    """Of each data set's training rows: of local files and generators with the model's tokenizer, where it is here.

    Raises:
        BadRequest: the data have no usable row.
    """
    limit = int({**settings.SFT, **recipe.train.sft}["max_length"])
    folder = fetch.config_folder(recipe.model)
    tokenizer = None
    if any(folder.glob("tokenizer*")):
        tokenizer = models.load_tokenizer(folder, recipe.model.trust_remote_code)
    return [_lengths(recipe, d, tokenizer, limit) for d in recipe.data]


def _lengths(recipe: Recipe, d: Data, tokenizer: PreTrainedTokenizerBase | None, limit: int) -> Lengths:
    why = f"{d.source} is not fetched for a plan" if data.is_hub(d.source) else ""
    if tokenizer is None:
        why = "the model has no tokenizer here"
    if why or tokenizer is None:
        half = limit / 2
        told = f"bounds: {why}, so every row is taken as max_length, {limit}"
        asked = {"self": half, "reference": limit, "few-shot": limit + drafts.SHOTS * (half + limit)}
        return Lengths(d.label, d.rows, half, half, limit, None, told, asked)
    splits = data.split(data.load(d), d)
    sizes = [_sizes(row, tokenizer) for row in splits.train[:COUNTED]]
    fit = [(p, r) for p, r in sizes if p + r <= limit] or [(limit // 2, limit // 2)]
    return Lengths(
        data=d.label,
        rows=len(splits.train),
        prompt=fmean(p for p, _ in fit),
        reference=fmean(r for _, r in fit),
        longest=max(p + r for p, r in fit),
        held_out=len(splits.held_out),
        source=f"counted on {len(sizes)} of {len(splits.train)} training rows; rewrites are taken to be as long as "
        "references",
        asked={m: _asked(recipe, m, splits, tokenizer) for m in drafts.MODES},
    )


def of_steps(
    recipe: Recipe, steps: Sequence[str], variants: Sequence[Variant], rows: Sequence[Lengths], depth: int
) -> list[Work]:
    """The work of each step; what is small beside passes through a model (prune, report, publish) has none.

    Args:
        steps: names of steps, such as `train/sft-gsm8k`.
        rows: of each data set, in the recipe's order.
        depth: blocks of the original.
    """
    mean = _in_turns(rows)
    by_data = {one.data: one for one in rows}
    arms = {v.id: v for v in variants}
    found: list[Work] = []
    for name in steps:
        kind, _, part = name.partition("/")
        if kind == "scan":
            found.append(_scan(recipe, mean, depth))
        elif kind == "rewrite":
            found += _rewrite(recipe, name, by_data.get(part, rows[0]))
        elif kind == "train":
            found += _train(recipe, name, arms[part], by_data[str(arms[part].data)])
        elif kind == "evaluate":
            found += _evaluate(recipe, name, "original" if part == "original" else "pruned", mean)
        elif kind == "compare":
            found += _compare(recipe, variants, mean)
    return found


def decoded_at_once(recipe: Recipe, rows: Sequence[Lengths]) -> tuple[int, int]:
    """Rows that rewriting decodes together, and the tokens of each one's prompt, of the longest prompts."""
    most = max(rows, key=lambda one: max(one.asked[m] for m in _modes(recipe)))
    mode = max(_modes(recipe), key=most.asked.__getitem__)
    return _at_once(recipe, most, mode), round(most.asked[mode])


def _sizes(row: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    head, tail = chat.answer_ids(tokenizer, chat.asked(row), row.reference)
    return len(head), len(tail) + 1  # the end of the turn


def _asked(recipe: Recipe, mode: str, splits: data.Splits, tokenizer: PreTrainedTokenizerBase) -> float:
    """Tokens of a prompt for rewriting, with references in the place of worked rewrites."""
    shots = [(row, row.reference) for row in splits.calibration[: drafts.SHOTS]]
    task, own = recipe.rewrite.task, recipe.rewrite.prompts
    texts = (chat.render(tokenizer, drafts.messages(r, task, mode, shots, own)) for r in splits.train[:PROMPTED])
    return fmean(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


def _in_turns(rows: Sequence[Lengths]) -> Lengths:
    """Several data sets as one, of which rows are taken in turn."""
    held_out = [one.held_out for one in rows if one.held_out is not None]
    return Lengths(
        data="",
        rows=sum(one.rows for one in rows),
        prompt=fmean(one.prompt for one in rows),
        reference=fmean(one.reference for one in rows),
        longest=max(one.longest for one in rows),
        held_out=sum(held_out) if len(held_out) == len(rows) else None,
        source="",
    )


def _scan(recipe: Recipe, rows: Lengths, depth: int) -> Work:
    """Scoring, and cuts that are measured from where they begin on: half of a pass on the average."""
    asked, blocks = recipe.scan, recipe.prune.blocks or 0
    each = min(asked.max_length, rows.prompt + rows.reference)
    if asked.search == "greedy":
        passes = blocks * depth / 2 * asked.verify_rows
    elif asked.select == "lowest":
        passes = float(asked.verify_rows)
    else:
        passes = asked.verify_rows * (1 + (3 * asked.candidates + 1) / 2)
        passes += asked.screen_rows * (1 + (depth - blocks + 1) / 2)
    return Work("scan", "original", forward=(asked.rows + passes) * each)


def _modes(recipe: Recipe) -> tuple[str, ...]:
    return drafts.MODES if recipe.rewrite.how == "best" else (recipe.rewrite.how,)


def _at_once(recipe: Recipe, rows: Lengths, mode: str) -> int:
    asked = recipe.rewrite
    fit = asked.batch_tokens // (round(rows.asked[mode]) + asked.max_new_tokens)
    return max(1, min(asked.batch_rows, rows.rows, fit))


def _rewrite(recipe: Recipe, name: str, rows: Lengths) -> list[Work]:
    """Each mode's drafts, those of the worked rewrites, and the likelihood of each draft and reference."""
    asked = recipe.rewrite
    if asked.from_ is not None:
        return [Work(name, "original")]
    if asked.engine != "transformers":
        return [Work(name, "original", unknown=_elsewhere(asked.engine))]
    spare = drafts.SHOT_ROWS if "few-shot" in _modes(recipe) else 0
    rounds = [(mode, rows.rows) for mode in _modes(recipe) for _ in range(asked.candidates)]
    found = [Work(name, "original", forward=(rows.rows + spare) * (rows.prompt + rows.reference))]
    for mode, count in [*rounds, *([("reference", spare)] if spare else [])]:
        at_once = min(count, _at_once(recipe, rows, mode))
        forward = count * (rows.asked[mode] + rows.prompt + rows.reference)
        passes = -(-count // at_once) * asked.max_new_tokens
        found.append(Work(name, "original", forward, passes=passes, rows=at_once, bound=True))
    return found


def _train(recipe: Recipe, name: str, variant: Variant, rows: Lengths) -> list[Work]:
    if variant.arm in recipe.train.adapter_from:
        return [Work(name, "pruned")]
    asked = {**settings.SFT, **recipe.train.sft}
    per_step = int(asked["per_device_train_batch_size"]) * int(asked["gradient_accumulation_steps"])
    seen = float(asked["num_train_epochs"]) * rows.rows
    if int(asked["max_steps"]) > 0:
        seen = int(asked["max_steps"]) * per_step
    tokens = -(-seen // per_step) * per_step * (rows.prompt + rows.reference)
    found = [Work(name, "pruned", trained=tokens)]
    if variant.arm in TAUGHT:
        found.append(Work(name, "original", forward=tokens))
    if variant.arm == "on-policy":
        longest = float(recipe.train.on_policy.get("max_completion_length", 256))
        found.append(Work(name, "pruned", passes=seen / per_step * longest, rows=per_step, bound=True))
    return found


def _evaluate(recipe: Recipe, name: str, model: str, rows: Lengths) -> list[Work]:
    if recipe.evaluate.engine != "transformers":
        return [Work(name, model, unknown=_elsewhere(recipe.evaluate.engine))]
    return [_asking(recipe, name, model, unit, rows) for unit in harness.units(recipe.evaluate)]


def _asking(recipe: Recipe, name: str, model: str, unit: Unit, rows: Lengths) -> Work:
    """A unit's documents: each context once, and every choice behind it."""
    task = unit.names[0]
    if task in harness.SUITES["demo"]:  # they share their question and its right solution; two add three wrong ones
        if rows.held_out is None:
            return Work(name, model, unknown="the held-out rows are not here")
        documents = min(unit.limit or rows.held_out, rows.held_out)
        return Work(name, model, forward=documents * (rows.prompt + 7 * rows.reference))
    known = TASKS.get(task)
    if known is None:
        return Work(name, model, unknown=f"the size of {task} is not known here")
    shots = OWN_SHOTS.get(task, 0) if unit.shots is None else unit.shots
    documents = _documents(recipe, task, known, shots)
    documents = min(unit.limit or documents, documents)
    context = known.head + known.context
    if not known.shared and recipe.evaluate.fewshot != "fixed":
        context += shots * (known.context + known.choice)
    if known.choices:
        return Work(name, model, forward=documents * (context + known.choices * known.choice))
    at_once = max(1, min(documents, recipe.evaluate.batch_tokens // round(context + GENERATED)))
    passes = -(-documents // at_once) * GENERATED
    return Work(name, model, documents * context, passes=passes, rows=at_once, bound=True)


def _documents(recipe: Recipe, task: str, known: Task, shots: int) -> int:
    """The task's documents, or those of a local file in its place, less what it gives to shots."""
    files = recipe.evaluate.data.get(task)
    if files is None or not Path(files.test).expanduser().is_file():
        return known.documents
    rows = taskfiles.count(task, files)
    if shots and files.fewshot is None:
        rows -= max(rows // taskfiles.SHARE, shots + 1)
    return max(1, rows)


def _elsewhere(engine: str) -> str:
    return "computed by the endpoint" if engine == "endpoint" else f"computed by {engine}, which is not measured"


def _compare(recipe: Recipe, variants: Sequence[Variant], rows: Lengths) -> list[Work]:
    """Answers of every variant, three texts through all of them, their use as drafts, and the speed of both shapes.

    As `compare` does it: the original is asked once for all variants on the family's own weights, and once more for
    each whole checkpoint.
    """
    asked = recipe.compare
    prompts = min(asked.prompts, rows.held_out) if rows.held_out is not None else asked.prompts
    others = len(variants) - 1
    adapters = set(recipe.train.adapter_from) if recipe.train.method == "full" else set(TEXTS)
    whole = [v for v in variants if v.arm not in ("original", "pruned", *adapters)]
    along = len(compare.ALONG) * prompts * (rows.prompt + asked.max_new_tokens)
    answers = -(-prompts // compare.BATCH) * asked.max_new_tokens
    read, at_once = prompts * rows.prompt, min(prompts, compare.BATCH)
    sped = min(compare.SPEED_PROMPTS, prompts)
    tokens = sped * min(compare.SPEED_TOKENS, asked.max_new_tokens)
    turns = speed.TURNS + 1  # one more in a process of its own
    own = Work("compare", "pruned", turns * 2 * speed.PROMPT, passes=turns * speed.NEW)
    # Alone and with a draft: a pass for each token at the most, and about as many of the draft.
    drafting = others * (2 * sped * rows.prompt), others * 2 * tokens
    return [
        Work("compare", "original", 2 * read + (1 + len(whole)) * along, passes=2 * answers, rows=at_once, bound=True),
        Work("compare", "pruned", others * (read + along), passes=others * answers, rows=at_once, bound=True),
        Work("compare", "original", drafting[0], passes=drafting[1], bound=True),
        Work("compare", "pruned", drafting[0] / 2, passes=drafting[1] / 2, bound=True),
        own,
        Work("compare", "original", own.forward, passes=own.passes),
    ]
