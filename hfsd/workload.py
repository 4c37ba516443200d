"""How many tokens each step of a recipe computes: from the real rows where they are at hand, else from its bounds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from hfsd import chat, data, fetch, models, settings
from hfsd.recipe import Recipe
from hfsd.records import TAUGHT, Example, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTED = 2000  # rows whose tokens are counted
SHOTS, SHOT_ROWS = 3, 16  # of few-shot rewriting: see `drafts`
TOGETHER = 8  # prompts that compare answers at once
DEMO = ("demo", "demo_match", "demo_rank", "demo_bpb")


@dataclass(frozen=True)
class Lengths:
    """Rows of a run and their tokens. `source` says whether they were counted or are the recipe's bounds."""

    rows: int
    prompt: float
    reference: float
    longest: int
    held_out: int | None
    source: str


@dataclass(frozen=True)
class Work:
    """What a step computes with one model (`original` or `pruned`).

    `forward` and `trained` are tokens, `passes` are decoded tokens of up to `rows` rows at once. `bound` is True where
    they are the most that it can be; `unknown` says why they are not known.
    """

    step: str
    model: str
    forward: float = 0.0
    trained: float = 0.0
    passes: float = 0.0
    rows: int = 1
    bound: bool = False
    unknown: str = ""


def lengths(recipe: Recipe) -> Lengths:
    """Of the training rows: of local files and generators with the model's tokenizer, where it is here.

    Raises:
        BadRequest: the data have no usable row.
    """
    limit = int({**settings.SFT, **recipe.train.sft}["max_length"])
    why = next((f"{d.source} is not fetched for a plan" for d in recipe.data if data.is_hub(d.source)), "")
    folder = fetch.config_folder(recipe.model)
    if not why and not any(folder.glob("tokenizer*")):
        why = "the model has no tokenizer here"
    if why:
        half = limit / 2
        rows = sum(d.rows for d in recipe.data)
        return Lengths(rows, half, half, limit, None, f"bounds: {why}, so every row is taken as max_length, {limit}")
    tokenizer = models.load_tokenizer(folder, recipe.model.trust_remote_code)
    splits = [data.split(data.load(d), d) for d in recipe.data]
    train = [row for s in splits for row in s.train]
    sizes = [_tokens(row, tokenizer) for row in train[:COUNTED]]
    fit = [(p, r) for p, r in sizes if p + r <= limit] or [(limit // 2, limit // 2)]
    return Lengths(
        rows=len(train),
        prompt=fmean(p for p, _ in fit),
        reference=fmean(r for _, r in fit),
        longest=max(p + r for p, r in fit),
        held_out=sum(len(s.held_out) for s in splits),
        source=f"counted on {len(sizes)} of {len(train)} training rows; rewrites are taken to be as long as references",
    )


def of_steps(
    recipe: Recipe, steps: Sequence[str], variants: Sequence[Variant], rows: Lengths, depth: int
) -> list[Work]:
    """The work of each step; what is small beside passes through a model (prune, report, publish) has none.

    Args:
        steps: names of steps, such as `train/sft-gsm8k`.
        depth: blocks of the original.
    """
    found: list[Work] = []
    for name in steps:
        kind, _, variant = name.partition("/")
        if kind == "scan":
            found.append(_scan(recipe, rows, depth))
        elif kind == "rewrite":
            found.append(_rewrite(recipe, name, rows))
        elif kind == "train":
            found += _train(recipe, name, variant, rows)
        elif kind == "evaluate":
            found.append(_evaluate(recipe, name, "original" if variant == "original" else "pruned", rows))
        elif kind == "compare":
            found += _compare(recipe, variants, rows)
    return found


def decoded_at_once(recipe: Recipe, rows: Lengths) -> tuple[int, int]:
    """Rows that rewriting decodes together, and the tokens of each one's prompt."""
    asked = recipe.rewrite
    context = _rewrite_prompt(recipe, rows)
    return max(1, min(asked.batch_rows, rows.rows, asked.batch_tokens // (context + asked.max_new_tokens))), context


def _tokens(row: Example, tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    head, tail = chat.answer_ids(tokenizer, chat.asked(row), row.reference)
    return len(head), len(tail) + 1  # the end of the turn


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
        passes += asked.screen_rows * (depth - blocks + 1) / 2
    return Work("scan", "original", forward=(asked.rows + passes) * each)


def _rewrite_prompt(recipe: Recipe, rows: Lengths) -> int:
    asked = {"self": 0.0, "few-shot": SHOTS * (rows.prompt + 2 * rows.reference)}.get(recipe.rewrite.how, 0.0)
    guide = 0.0 if recipe.rewrite.how == "self" else rows.reference
    return round(rows.prompt + guide + asked)


def _rewrite(recipe: Recipe, name: str, rows: Lengths) -> Work:
    asked = recipe.rewrite
    if asked.from_ is not None:
        return Work(name, "original")
    if asked.engine == "endpoint":
        return Work(name, "original", unknown="computed by the endpoint")
    at_once, context = decoded_at_once(recipe, rows)
    modes = 3 if asked.how == "best" else 1
    mine = rows.rows / len(recipe.data)
    batches = modes * asked.candidates * -(-mine // at_once)
    if asked.how in ("best", "few-shot"):
        batches += -(-SHOT_ROWS // at_once)
    drafts = modes * asked.candidates * mine
    scored = drafts + mine if asked.likelier or asked.how == "best" else 0.0
    forward = drafts * context + scored * (rows.prompt + rows.reference)
    return Work(name, "original", forward, passes=batches * asked.max_new_tokens, rows=at_once, bound=True)


def _train(recipe: Recipe, name: str, variant: str, rows: Lengths) -> list[Work]:
    arm = next(a for a in recipe.train.arms if variant == a or variant.startswith(f"{a}-"))
    if arm in recipe.train.adapter_from:
        return [Work(name, "pruned")]
    asked = {**settings.SFT, **recipe.train.sft}
    per_step = int(asked["per_device_train_batch_size"]) * int(asked["gradient_accumulation_steps"])
    mine = rows.rows / len(recipe.data)
    seen = float(asked["num_train_epochs"]) * mine
    if int(asked["max_steps"]) > 0:
        seen = int(asked["max_steps"]) * per_step
    tokens = -(-seen // per_step) * per_step * (rows.prompt + rows.reference)
    found = [Work(name, "pruned", trained=tokens)]
    if arm in TAUGHT:
        found.append(Work(name, "original", forward=tokens))
    if arm == "on-policy":
        longest = float(recipe.train.on_policy.get("max_completion_length", 256))
        found.append(Work(name, "pruned", passes=seen / per_step * longest, rows=per_step, bound=True))
    return found


def _evaluate(recipe: Recipe, name: str, model: str, rows: Lengths) -> Work:
    """The demo's tasks share their question and its right solution; two of them add three wrong ones each."""
    others = [task for task in recipe.evaluate.tasks if task not in DEMO]
    if others or rows.held_out is None:
        why = f"the data of {others[0]} are not read for a plan" if others else "the held-out rows are not here"
        return Work(name, model, unknown=why)
    documents = min(recipe.evaluate.limit or rows.held_out, rows.held_out)
    return Work(name, model, forward=documents * (rows.prompt + 7 * rows.reference))


def _compare(recipe: Recipe, variants: Sequence[Variant], rows: Lengths) -> list[Work]:
    """Greedy answers of every variant and sampled ones of the original; three texts through every variant."""
    asked = recipe.compare
    prompts = min(asked.prompts, rows.held_out) if rows.held_out is not None else asked.prompts
    passes = -(-prompts // TOGETHER) * asked.max_new_tokens
    forward = 3 * prompts * (rows.prompt + asked.max_new_tokens)
    others = len(variants) - 1
    at_once = min(prompts, TOGETHER)
    return [
        Work("compare", "original", forward, passes=2 * passes, rows=at_once, bound=True),
        Work("compare", "pruned", others * forward, passes=others * passes, rows=at_once, bound=True),
    ]
