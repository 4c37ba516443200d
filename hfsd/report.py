"""From records to a report: results.json, report.md, index.html and pictures. Pure: no torch, no network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import page, report_figures, report_text, stats, text
from hfsd.errors import HfsdError
from hfsd.findings import Answer, Cost, Draft, EvalRow, Results, Shift
from hfsd.markdown import escape, fence, shorten
from hfsd.markdown import table as table_of
from hfsd.plain import dumps
from hfsd.records import MergeReport, ModelRef, PrunePlan, Scan, TrainReport, TrainSet
from hfsd.report_figures import Picture
from hfsd.report_text import SHOWN_ANSWERS, SHOWN_CHARS
from hfsd.rundir import write_atomic
from hfsd.text import table

if TYPE_CHECKING:
    from hfsd.documents import Answered, Key

__all__ = ["markdown", "summarise", "table", "write"]


def summarise(
    *,
    name: str,
    recipe: str,
    original: ModelRef,
    params: Mapping[str, int],
    plan: PrunePlan,
    scan: Scan | None,
    rows: Sequence[EvalRow],
    documents: Mapping[Key, Answered],
    shifts: Sequence[Shift] = (),
    train_sets: Mapping[str, TrainSet] | None = None,
    training: Sequence[TrainReport] = (),
    stage_seconds: Mapping[str, float] | None = None,
    matmul_flop_cut: float,
    param_cut: float,
    facts: Mapping[str, Any] | None = None,
    merges: Mapping[str, MergeReport] | None = None,
    drafts: Sequence[Draft] = (),
    costs: Sequence[Cost] = (),
) -> Results:
    """Everything a report, a card or the Space says about a run.

    Args:
        name: name of the recipe.
        recipe: the resolved recipe's own YAML text.
        params: parameters per variant id.
        scan: None where the cut was given by hand.
        rows: scores of all variants; every variant on every task, on the same documents.
        documents: each document's own results, as `documents.read` gives them for these rows; a task without them has
            no paired interval.
        train_sets: rewritten sets by name of the data.
        matmul_flop_cut: share of the matmul FLOPs per token that the cut saves, such as 0.1744.
        param_cut: share of the parameters that the cut removes, such as 0.1630.
        facts: what cards state besides (see `hfsd.cards`).
        merges: how each merged variant was made, by its id.
        drafts: the variants as draft models of the original.
        costs: what the original and the pruned shape cost to run.

    Raises:
        HfsdError: scores are missing, cannot be compared, or a share is none.
    """
    from hfsd import paired, summary

    for what, share in (("matmul_flop_cut", matmul_flop_cut), ("param_cut", param_cut)):
        if not 0 <= share < 1:
            raise HfsdError(f"{what} is {share}; it is a share, from 0 to less than 1")
    draws = paired.resample(documents)
    tasks = summary.summarise_tasks(rows, draws)
    variants = sorted({row.variant for row in rows}, key=stats.by_arm)
    asked = paired.pairs(variants, {name: m.parts for name, m in (merges or {}).items()})
    return Results(
        name=name,
        original=original,
        original_params=int(params.get("original", 0)),
        plan=plan,
        scan=scan,
        variants=summary.summarise_variants(tasks, variants, params, shifts, training, draws),
        tasks=tasks,
        train_sets=dict(train_sets or {}),
        training=sorted(training, key=lambda t: stats.by_arm(t.variant)),
        stage_seconds=dict(stage_seconds or {}),
        matmul_flop_cut=float(matmul_flop_cut),
        param_cut=float(param_cut),
        recipe=recipe,
        facts=dict(facts or {}),
        merges=dict(merges or {}),
        paired=paired.compare(tasks, documents, draws, asked),
        drafts=sorted(drafts, key=lambda d: stats.by_arm(d.variant)),
        costs=list(costs),
    )


def write(results: Results, answers: Sequence[Answer], out: Path) -> list[Path]:
    """Writes results.json, the pictures, report.md and index.html into `out`, and returns their paths in that order."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.json", dumps(results))
    pictures = report_figures.draw(results, out)
    write_atomic(out / "report.md", markdown(results, answers, pictures))
    write_atomic(out / "index.html", page.html(results, answers))
    return [out / name for name in ("results.json", *pictures, "report.md", "index.html")]


def markdown(results: Results, answers: Sequence[Answer], pictures: Sequence[str]) -> str:
    """The text of report.md; `pictures` are file names beside it."""
    drawn = {p.file: p for p in report_figures.pictures(results) if p.file in pictures}
    parts = [
        f"# {escape(results.name)}",
        escape(text.headline(results)),
        *_pictures(drawn, "recovery.png"),
        "## Scores",
        table_of(table(results)),
        _bullets(text.notes(results)),
        *_pictures(drawn, "tasks.png"),
        *_titled("### Recovery, task by task", report_text.recovery_table(results)),
        *_differences(results),
        *_titled("## Over seeds", text.seeds_table(results), "Mean and sample standard deviation over the seeds."),
        *_removed(results, drawn),
        *_data(results),
        *_training(results, drawn),
        *_shift(results, drawn),
        *_answers(results, answers),
        *_titled("## Draft use", text.draft_table(results)),
        _bullets(text.draft_notes(results)),
        *_cost(results),
        *_provenance(results),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def _pictures(drawn: Mapping[str, Picture], *names: str) -> list[str]:
    return [part for name in names if name in drawn for part in _picture(drawn[name])]


def _picture(picture: Picture) -> list[str]:
    return [f"![{picture.words}]({picture.file})", escape(picture.caption)]


def _bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _titled(title: str, rows: report_text.Table, *said: str) -> list[str]:
    """A section of a table, where there is one."""
    return [title, *said, table_of(rows)] if rows else []


def _differences(results: Results) -> list[str]:
    parts = _titled("### Between variants", text.paired_table(results))
    parts += _titled("### From the original", text.paired_table(results, "original"))
    return ["## Differences", *parts, escape(text.PAIRED_NOTE)] if parts else []


def _removed(results: Results, drawn: Mapping[str, Picture]) -> list[str]:
    why = f"Why: {escape(results.plan.why)}." if results.plan.why else ""
    by_hand = "" if results.scan else "The cut was given by hand: no scan was run."
    return [
        "## What was removed",
        f"The cut {escape(results.plan.sentence)}. {why} {by_hand}".strip(),
        *_pictures(drawn, "block_scores.png", "candidates.png"),
    ]


def _data(results: Results) -> list[str]:
    parts = ["## Data"] if results.train_sets else []
    for name, train_set in sorted(results.train_sets.items()):
        parts.append(escape(text.data_sentence(name, train_set)))
        parts.append(table_of(text.reasons_table(train_set)))
    return parts


def _training(results: Results, drawn: Mapping[str, Picture]) -> list[str]:
    return [
        *_titled("## Training", report_text.training_table(results)),
        _bullets([f"{name}: {m.sentence}." for name, m in sorted(results.merges.items())]),
        *_pictures(drawn, "loss.png"),
        *_titled("### Every hyperparameter, and what the arms share", report_text.hyperparameters_table(results)),
    ]


def _shift(results: Results, drawn: Mapping[str, Picture]) -> list[str]:
    parts = _titled("## Shift from the original", report_text.shift_table(results))
    pictures = _pictures(drawn, "kl_sampled.png", "kl_references.png", "similarity.png")
    return [*parts, escape(report_text.SHIFT_NOTE), *pictures] if parts else []


def _answers(results: Results, answers: Sequence[Answer]) -> list[str]:
    if not answers:
        return []
    shown = answers[:SHOWN_ANSWERS]
    parts = ["## Side by side", f"{len(shown)} of {text.plural(len(answers), 'held-out prompt')}, answered greedily."]
    for answer in shown:
        parts += [f"### {escape(answer.id)}", "Prompt:", fence(shorten(answer.prompt, SHOWN_CHARS))]
        parts += ["Reference:", fence(shorten(answer.reference, SHOWN_CHARS))]
        for line in results.variants:
            if (said := answer.answers.get(line.variant.id)) is not None:
                parts += [f"{escape(line.variant.id)}:", fence(shorten(said, SHOWN_CHARS))]
    return parts


def _cost(results: Results) -> list[str]:
    costs, steps = text.cost_table(results), report_text.steps_table(results)
    if not costs and not steps:
        return []
    return [
        "## Cost",
        report_text.saved(results),
        *([table_of(costs), _bullets(text.cost_notes(results))] if costs else []),
        *_titled("### This run", steps),
    ]


def _provenance(results: Results) -> list[str]:
    parts = ["## Provenance", table_of([["what", "value"], *report_text.facts(results)]), "### The commands"]
    parts.append("With `hfsd` installed, save the recipe below as `recipe.yaml`.")
    for what, command in report_text.commands(results):
        parts += [f"{what}:", fence(command, "bash")]
    return [*parts, "### The exact recipe", fence(results.recipe, "yaml")]
