"""From records to a report: results.json, report.md and pictures. Pure: no torch, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hfsd import report_figures, stats
from hfsd.errors import HfsdError
from hfsd.figures import COLOURS
from hfsd.markdown import escape, fence, shorten
from hfsd.markdown import table as table_of
from hfsd.plain import dumps
from hfsd.records import (
    Answer,
    EvalRow,
    MergeReport,
    ModelRef,
    PrunePlan,
    Results,
    Scan,
    Shift,
    TrainReport,
    TrainSet,
)
from hfsd.text import (
    count,
    data_sentence,
    duration,
    headline,
    losses,
    notes,
    plural,
    reasons_table,
    seeds_table,
    size,
    stages,
    table,
)

__all__ = ["COLOURS", "summarise", "table", "write"]

SHOWN_ANSWERS = 8
SHOWN_CHARS = 1500


def summarise(
    *,
    name: str,
    recipe: str,
    original: ModelRef,
    params: Mapping[str, int],
    plan: PrunePlan,
    scan: Scan | None,
    rows: Sequence[EvalRow],
    shifts: Sequence[Shift] = (),
    train_sets: Mapping[str, TrainSet] | None = None,
    training: Sequence[TrainReport] = (),
    stage_seconds: Mapping[str, float] | None = None,
    matmul_flop_cut: float,
    param_cut: float,
    facts: Mapping[str, Any] | None = None,
    merges: Mapping[str, MergeReport] | None = None,
) -> Results:
    """Everything a report, a card or the Space says about a run.

    Args:
        name: name of the recipe.
        recipe: the resolved recipe's own YAML text.
        params: parameters per variant id.
        scan: None where the cut was given by hand.
        rows: scores of all variants; every variant on every task, on the same documents.
        train_sets: rewritten sets by name of the data.
        matmul_flop_cut: share of the matmul FLOPs per token that the cut saves, such as 0.1744.
        param_cut: share of the parameters that the cut removes, such as 0.1630.
        facts: what cards state besides (see `hfsd.cards`).
        merges: how each merged variant was made, by its id.

    Raises:
        HfsdError: scores are missing, cannot be compared, or a share is none.
    """
    for what, share in (("matmul_flop_cut", matmul_flop_cut), ("param_cut", param_cut)):
        if not 0 <= share < 1:
            raise HfsdError(f"{what} is {share}; it is a share, from 0 to less than 1")
    tasks = stats.summarise_tasks(rows)
    variants = sorted({row.variant for row in rows}, key=stats.by_arm)
    return Results(
        name=name,
        original=original,
        original_params=int(params.get("original", 0)),
        plan=plan,
        scan=scan,
        variants=stats.summarise_variants(tasks, variants, params, shifts, training),
        tasks=tasks,
        train_sets=dict(train_sets or {}),
        training=sorted(training, key=lambda t: stats.by_arm(t.variant)),
        stage_seconds=dict(stage_seconds or {}),
        matmul_flop_cut=float(matmul_flop_cut),
        param_cut=float(param_cut),
        recipe=recipe,
        facts=dict(facts or {}),
        merges=dict(merges or {}),
    )


def write(results: Results, answers: Sequence[Answer], out: Path) -> list[Path]:
    """Writes results.json, the pictures and report.md into `out`, and returns their paths in that order."""
    out.mkdir(parents=True, exist_ok=True)
    record = out / "results.json"
    record.write_text(dumps(results), encoding="utf-8")
    pictures = report_figures.draw(results, out)
    page = out / "report.md"
    page.write_text(markdown(results, answers, pictures), encoding="utf-8")
    return [record, *(out / p for p in pictures), page]


def markdown(results: Results, answers: Sequence[Answer], pictures: Sequence[str]) -> str:
    """The text of report.md; `pictures` are file names beside it."""
    parts = [
        f"# {escape(results.name)}",
        escape(headline(results)),
        *_picture("recovery.png", "Scores and recovery of every variant with 95% intervals", pictures),
        "## Scores",
        table_of(table(results)),
        _bullets(notes(results)),
        *_seeds(results),
        *_lost(results),
        *_removed(results, pictures),
        *_data(results),
        *_training(results, pictures),
        *_answers(results, answers),
        *_cost(results),
        *_provenance(results),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _picture(name: str, words: str, pictures: Sequence[str]) -> list[str]:
    return [f"![{words}]({name})"] if name in pictures else []


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _seeds(results: Results) -> list[str]:
    rows = seeds_table(results)
    return ["## Over seeds", "Mean and sample standard deviation over the seeds.", table_of(rows)] if rows else []


def _lost(results: Results) -> list[str]:
    parts = ["## Against the original, task by task"]
    for line in results.variants:
        if line.variant.arm != "original":
            parts += [f"{escape(line.variant.id)}:", _bullets(losses(results, line.variant.id))]
    return parts if len(parts) > 1 else []


def _removed(results: Results, pictures: Sequence[str]) -> list[str]:
    why = f"Why: {escape(results.plan.why)}." if results.plan.why else ""
    by_hand = "" if results.scan else "The cut was given by hand: no scan was run."
    return [
        "## What was removed",
        f"The cut {escape(results.plan.sentence)}. {why} {by_hand}".strip(),
        *_picture("block_scores.png", "Scores of every range of blocks, the removed one marked", pictures),
        *_picture("candidates.png", "Held-out loss without each verified range", pictures),
    ]


def _data(results: Results) -> list[str]:
    parts = ["## Data"] if results.train_sets else []
    for name, train_set in sorted(results.train_sets.items()):
        parts.append(escape(data_sentence(name, train_set)))
        parts.append(table_of(reasons_table(train_set)))
    return parts


def _training(results: Results, pictures: Sequence[str]) -> list[str]:
    if not results.training:
        return []
    head = ["", *(t.variant.id for t in results.training)]
    rows = [
        ["method", *(t.method for t in results.training)],
        ["run by", *(t.engine for t in results.training)],
        ["rows", *(str(t.rows) for t in results.training)],
        ["optimizer steps", *(str(t.steps) for t in results.training)],
        ["trained tokens", *(f"{t.tokens:,}" for t in results.training)],
        ["last loss (nats per token)", *(f"{t.losses[-1][1]:.3f}" if t.losses else "-" for t in results.training)],
        ["trained parameters", *(count(t.trained_params) for t in results.training)],
        ["time", *(duration(t.seconds) for t in results.training)],
        ["peak memory of the process so far", *(size(t.peak_bytes) for t in results.training)],
    ]
    return [
        "## Training",
        table_of([head, *rows]),
        *_picture("loss.png", "Training loss of every arm over optimizer steps", pictures),
        _bullets([f"{name}: {m.sentence}." for name, m in sorted(results.merges.items())]),
    ]


def _answers(results: Results, answers: Sequence[Answer]) -> list[str]:
    if not answers:
        return []
    shown = answers[:SHOWN_ANSWERS]
    parts = ["## Side by side", f"{len(shown)} of {plural(len(answers), 'held-out prompt')}, answered greedily."]
    for answer in shown:
        parts += [f"### {escape(answer.id)}", "Prompt:", fence(shorten(answer.prompt, SHOWN_CHARS))]
        parts += ["Reference:", fence(shorten(answer.reference, SHOWN_CHARS))]
        for line in results.variants:
            if (text := answer.answers.get(line.variant.id)) is not None:
                parts += [f"{escape(line.variant.id)}:", fence(shorten(text, SHOWN_CHARS))]
    return parts


def _cost(results: Results) -> list[str]:
    if not results.stage_seconds:
        return []
    rows = [[stage, duration(seconds)] for stage, seconds in stages(results)]
    rows.append(["all", duration(sum(results.stage_seconds.values()))])
    saved = (
        f"The cut saves {100 * results.param_cut:.2f}% of the parameters and {100 * results.matmul_flop_cut:.2f}% of "
        "the matmul FLOPs per token (two different numbers: embeddings hold parameters and multiply nothing)."
    )
    return ["## Cost", saved, table_of([["stage", "wall time"], *rows])]


def _provenance(results: Results) -> list[str]:
    ref = results.original
    lines = [
        f"Original: {ref.repo}"
        + (f" at {ref.revision}" if ref.revision else "")
        + f", {count(results.original_params)} parameters."
    ]
    lines += [f"{key}: {value}" for key, value in sorted(results.facts.items()) if isinstance(value, str | int | float)]
    return [
        "## Provenance",
        _bullets(lines),
        "The exact recipe, as `recipe.yaml`:",
        fence(results.recipe, "yaml"),
        "The command:",
        fence("hfsd run recipe.yaml", "bash"),
    ]
