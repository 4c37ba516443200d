"""Made-up records of a run named "tiny": what the report and the cards are tested on. No number in it was measured."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy

from hfsd import report
from hfsd.documents import TOLERANCE, Answered, Key
from hfsd.findings import Along, Answer, Cost, Draft, Estimate, EvalRow, Results, Setup, Shift
from hfsd.records import BlockScores, Candidate, ModelRef, PrunePlan, Scan, TrainReport, TrainSet, Variant

ORIGINAL, PRUNED = Variant("original"), Variant("pruned")
SFT, DISTILLED = Variant("sft", "tiny-data"), Variant("self-distilled", "tiny-data")
VARIANTS = (ORIGINAL, PRUNED, SFT, DISTILLED)
BREAKOUT = "before\n```\n# heading\n````\n<script>alert('x')</script> ![x](http://example.com/x.png)\n---\nkey: value"


SETUP = Setup(chat_template=True, multiturn=True)


def row(variant: Variant, task: str, value: float, n: int = 200, **kw) -> EvalRow:
    """One made-up score."""
    base = {"version": "1.0", "metric": "acc", "filter": "none", "shots": 0, "stderr": None, "chance": 0.25}
    base |= {"higher_is_better": True, "doc_file": f"{task}.docs.jsonl", "setup": SETUP} | kw
    return EvalRow(variant=variant, task=task, value=value, n=n, **base)


def rows(values: dict[str, tuple[float, ...]], n: int = 200, **kw) -> list[EvalRow]:
    """Scores of all four variants per task."""
    return [row(v, task, x, n, **kw) for task, xs in values.items() for v, x in zip(VARIANTS, xs, strict=True)]


def bits(values: tuple[float, ...]) -> list[EvalRow]:
    """A lower-is-better task."""
    return rows({"tiny_bpb": values}, metric="bits_per_byte", chance=None, higher_is_better=False, stderr=0.01)


def documents(scores: Sequence[EvalRow]) -> dict[Key, Answered]:
    """Documents that give these scores, where some do; all tasks ask the same ones, each variant is right elsewhere."""
    table: dict[Key, list[EvalRow]] = {}
    for row in scores:
        table.setdefault((row.task, row.metric, row.filter), []).append(row)
    found = {}
    for key, mine in table.items():
        n = mine[0].n
        sides = [_side(row, n) for row in mine]
        if all(sides):
            sums = {row.variant.id: numpy.array(side[0]) for row, side in zip(mine, sides, strict=True)}
            weights = {row.variant.id: numpy.array(side[1]) for row, side in zip(mine, sides, strict=True)}
            found[key] = Answered(key[1], tuple((key[0], f"d{i:05}", f"{key[0]} {i}") for i in range(n)), sums, weights)
    return found


def _side(row: EvalRow, n: int) -> tuple[list[float], list[float]] | None:
    chosen = random.Random(f"{row.task} {row.metric} {row.variant.id}")
    if row.n != n or n < 1 or not math.isfinite(row.value):
        return None
    if row.metric == "bits_per_byte":
        weights = [float(chosen.randint(50, 150)) for _ in range(n)]
        sums = [-row.value * math.log(2) * w * chosen.uniform(0.5, 1.5) for w in weights]
        off = -row.value * math.log(2) * sum(weights) / sum(sums)
        return [s * off for s in sums], weights
    right = round(row.value * n)
    if abs(right / n - row.value) > TOLERANCE:
        return None
    where = set(chosen.sample(range(n), right))
    return [float(i in where) for i in range(n)], [1.0] * n


def along(kl: float, top1: float = 0.7) -> Along:
    """Made-up distances along one kind of text."""
    return Along(kl, 0.1, top1, 0.8, 0.02, 8, 300, [kl * (0.5 + i / 7) for i in range(8)])


def shift(variant: Variant, kl: float) -> Shift:
    """A made-up shift: less along greedy answers, more along references."""
    return Shift(variant, along(kl), along(kl / 2), along(kl * 2), [0.1 * i for i in range(2, 10)], "ROUGE-1")


def draft(variant: Variant, acceptance: float) -> Draft:
    """A made-up draft use."""
    passes = {g: (1 - acceptance ** (g + 1)) / (1 - acceptance) for g in range(1, 9)}
    speed = Estimate(1.1, 1.0, 1.3)
    how = "4 drafted tokens, 3 prompts of 32 tokens"
    return Draft(variant, acceptance, 0.02, acceptance + 0.1, passes, speed, how, prompts=8, n_tokens=300)


COSTS = [
    Cost(
        "original", 1_000_000, 1_800_000, 768, 4_000_000, Estimate(900, 880, 910), Estimate(40, 39, 42), 9_000_000, "x"
    ),
    Cost(
        "pruned", 700_000, 1_200_000, 512, 2_800_000, Estimate(1300, 1290, 1310), Estimate(60, 55, 61), 7_000_000, "x"
    ),
]
GOOD = {"tiny_match": (0.70, 0.40, 0.55, 0.65), "tiny_rank": (0.60, 0.30, 0.50, 0.55)}
PLAN = PrunePlan(6, (0, 1, 4, 5), "least held-out loss of 2 candidates (proposed by all tokens)")


def scan(plan: PrunePlan = PLAN) -> Scan:
    """A made-up scan of six blocks."""
    values = {w: [0.05 * w + 0.01 * s for s in range(6 - w + 1)] for w in range(1, 6)}
    scores = {t: BlockScores("angular", t, 8, 400, values) for t in ("all", "last")}
    found = [Candidate((2, 3), 3.6, "all tokens"), Candidate((0, 1), 5.2, "last tokens")]
    return Scan(scores, found, 3.2, plan, ModelRef("tiny"), 1.5)


def trained(variant: Variant) -> TrainReport:
    """A made-up training."""
    losses = [[float(i), 1.0 / i] for i in range(1, 9)]
    settings_ = {"lora_r": 8, "lora_targets": ["q_proj", "v_proj"], "learning_rate": 1e-3, "warmup_steps": None}
    return TrainReport(
        variant, "adapter", "merged", 20, 8, 900, losses, 12.0, 300_000_000, 4096, settings_, {"rows": "abc"}
    )


def made(**kw) -> Results:
    """Results of the made-up run "tiny"."""
    given_ = {
        "name": "tiny",
        "recipe": "name: tiny\nmodel: org/tiny\n",
        "original": ModelRef("org/tiny", "a" * 40),
        "params": {"original": 1_000_000, "pruned": 700_000, SFT.id: 700_000, DISTILLED.id: 700_000},
        "plan": PLAN,
        "scan": scan(),
        "rows": rows(GOOD) + bits((0.9, 1.5, 0.8, 0.95)),
        "shifts": [shift(PRUNED, 1.5), shift(SFT, 0.9), shift(DISTILLED, 0.4)],
        "drafts": [draft(PRUNED, 0.6), draft(SFT, 0.7), draft(DISTILLED, 0.8)],
        "costs": COSTS,
        "train_sets": {
            "tiny-data": TrainSet(
                "rewrite",
                20,
                0.75,
                {"kept": 15, "leak": 2, "wrong answer": 3},
                800,
                9.0,
                "transformers",
                {"temperature": 0.0},
                1000,
                900,
            )
        },
        "training": [trained(DISTILLED), trained(SFT)],
        "stage_seconds": {"scan": 1.5, f"train/{DISTILLED.id}": 12.0, f"train/{SFT.id}": 12.0, "rewrite": 9.0},
        "matmul_flop_cut": 0.3333,
        "param_cut": 0.3,
        "facts": {"license": "apache-2.0", "language": ["en"]},
    }
    given_ |= kw
    return report.summarise(**{"documents": documents(given_["rows"])} | given_)


def answers(prompt: str = "2 + 3?", reply: str = "It is 5.", n: int = 9) -> list[Answer]:
    """Side-by-side answers."""
    return [Answer(f"q{i}", prompt, "5", {v.id: reply for v in VARIANTS}) for i in range(n)]


def html(source: str) -> str:
    """The page that a Markdown reader shows."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable("table").render(source)
