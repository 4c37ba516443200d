"""Made-up records of a run named "tiny": what the report and the cards are tested on. No number in it was measured."""

from __future__ import annotations

from hfsd import report
from hfsd.records import (
    Answer,
    BlockScores,
    Candidate,
    EvalRow,
    ModelRef,
    PrunePlan,
    Results,
    Scan,
    Shift,
    TrainReport,
    TrainSet,
    Variant,
)

ORIGINAL, PRUNED = Variant("original"), Variant("pruned")
SFT, DISTILLED = Variant("sft", "tiny-data"), Variant("self-distilled", "tiny-data")
VARIANTS = (ORIGINAL, PRUNED, SFT, DISTILLED)
BREAKOUT = "before\n```\n# heading\n````\n<script>alert('x')</script> ![x](http://example.com/x.png)\n---\nkey: value"


def row(variant: Variant, task: str, value: float, n: int = 200, **kw) -> EvalRow:
    """One made-up score."""
    base = {"version": "1.0", "metric": "acc", "filter": "none", "shots": 0, "stderr": None, "chance": 0.25}
    base |= {"higher_is_better": True, "doc_file": "docs.jsonl"} | kw
    return EvalRow(variant=variant, task=task, value=value, n=n, **base)


def rows(values: dict[str, tuple[float, ...]], n: int = 200, **kw) -> list[EvalRow]:
    """Scores of all four variants per task."""
    return [row(v, task, x, n, **kw) for task, xs in values.items() for v, x in zip(VARIANTS, xs, strict=True)]


def bits(values: tuple[float, ...]) -> list[EvalRow]:
    """A lower-is-better task."""
    return rows({"tiny_bpb": values}, metric="bits_per_byte", chance=None, higher_is_better=False, stderr=0.01)


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
        "shifts": [
            Shift(PRUNED, 1.5, 0.1, 0.6, 8, 300),
            Shift(SFT, 0.9, 0.1, 0.7, 8, 300),
            Shift(DISTILLED, 0.4, 0.1, 0.8, 8, 300),
        ],
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
    return report.summarise(**(given_ | kw))


def answers(prompt: str = "2 + 3?", reply: str = "It is 5.", n: int = 9) -> list[Answer]:
    """Side-by-side answers."""
    return [Answer(f"q{i}", prompt, "5", {v.id: reply for v in VARIANTS}) for i in range(n)]


def html(source: str) -> str:
    """The page that a Markdown reader shows."""
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": True}).enable("table").render(source)
