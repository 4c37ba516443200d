"""The pictures of a report: recovery, scores, shift, and those of the stages that the results can fill.

All are narrow enough to be read on a phone. The same ones stand in index.html, and as PNG files beside report.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfsd.figures import COLOURS, MUTED, blank, block_scores, candidates, chosen_scores, loss, save
from hfsd.findings import Along, Results, Shift
from hfsd.records import Scan, Variant, spelled
from hfsd.score_figures import PANELS, WIDTH, recovery, short_names, tasks
from hfsd.text import NA, at_n, counted, kl_text, label, plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BARS = 20  # of a histogram


@dataclass(frozen=True)
class Picture:
    """A picture by its PNG file. `words` stand in for it, `caption` under it; `on_page` draws it for the page."""

    file: str
    words: str
    caption: str
    make: Callable[[], Figure]
    on_page: Callable[[], Figure]


def pictures(results: Results) -> list[Picture]:
    """The pictures that the results can fill, in the order of the report; `recovery.png` is always there."""
    n_tasks = len(results.tasks)
    more = f" These are the first {PANELS} of {n_tasks} tasks; the table has all." if n_tasks > PANELS else ""
    return [
        _own(
            "recovery.png",
            "Bars: recovery of every variant with 95% intervals",
            "Recovery is the variant's mean score over the original's; chance-corrected takes the score of guessing "
            f"from both before. {_over(results)} Whiskers: 95% intervals of a paired bootstrap over documents; one "
            "without an end goes on beyond the axis.",
            lambda: recovery(results),
        ),
        _own(
            "tasks.png",
            "Dots: score of every variant on every task with 95% intervals",
            f"Dots are scores, whiskers their 95% intervals. Right: recovery on that task with its own.{more}",
            lambda: tasks(results),
        ),
        *_stages(results),
        *_shifts(results),
    ]


def draw(results: Results, out: Path) -> list[str]:
    """Writes the pictures as PNG files, and returns their names."""
    files = {picture.file: picture.make for picture in pictures(results)}
    save(files, out)
    return list(files)


def _stages(results: Results) -> Iterator[Picture]:
    """Block scores and candidates where a scan was run, losses where an arm was trained."""
    scan, plan = results.scan, results.plan
    if scan and scan.scores:
        yield Picture(
            "block_scores.png",
            "Heat map: scores of every range of blocks, the removed one marked",
            _scores_caption(scan, results),
            lambda: block_scores(chosen_scores(scan, plan), plan),
            lambda: _slim(block_scores(chosen_scores(scan, plan), plan), 3.9, x="first block of the range"),
        )
    if scan and scan.candidates:
        yield Picture(
            "candidates.png",
            "Held-out loss without each verified range",
            f"Loss on held-out calibration text without each range. Line: the original's {scan.original_loss:.3f}.",
            lambda: candidates(scan, plan),
            lambda: _slim(candidates(scan, plan), x="held-out loss (nats per token)"),
        )
    if any(t.losses for t in results.training):
        yield Picture(
            "loss.png",
            "Training loss of every arm over optimizer steps",
            "The arms learn different answers, so that their levels do not compare.",
            lambda: loss(results.training),
            lambda: _slim_loss(results),
        )


def _scores_caption(scan: Scan, results: Results) -> str:
    scores = chosen_scores(scan, results.plan)
    which = "the last text token" if scores.tokens == "last" else f"{scores.tokens} text tokens"
    return (
        f"How far each range of blocks moves the residual stream, over {which} of n = {scores.samples} sequences "
        f"({scores.n_tokens:,} tokens). White dots: the lowest of each width; circled: removed, "
        f"{spelled(results.plan.removed)}."
    )


def _slim(figure: Figure, height: float | None = None, x: str | None = None) -> Figure:
    """A stage's picture for the page: as narrow as ours; what its title says stands in the caption."""
    figure.set_size_inches(WIDTH, height or figure.get_figheight())
    for axes in figure.axes:
        axes.set_title("")
    if x:
        figure.axes[0].set_xlabel(x)
    return figure


def _slim_loss(results: Results) -> Figure:
    figure = _slim(loss(results.training), 3.3)
    names = short_names([v.variant for v in results.variants])
    # what else its legend says stands in the table above it
    drawn = [names.get(t.variant.id, t.variant.id) for t in results.training if t.losses]
    figure.axes[0].set_ylabel("nats per completion token")
    figure.axes[0].legend(labels=drawn, loc="lower left", frameon=False)
    return figure


def _shifts(results: Results) -> Iterator[Picture]:
    """Histograms over held-out prompts, where variants were compared with the original."""
    shifts = [v.shift for v in results.variants if v.shift]
    if not shifts:
        return
    names = short_names([v.variant for v in results.variants])
    prompts = plural(shifts[0].sampled.prompts, "held-out prompt")
    kinds: list[tuple[str, str, Callable[[Shift], Along]]] = [
        ("kl_sampled.png", "the original's own sampled answers", lambda s: s.sampled),
        ("kl_references.png", "the references", lambda s: s.references),
    ]
    # one axis for both: that references lie farther off is then seen
    top = max([1e-3, *(x for _, _, along in kinds for s in shifts for x in along(s).kls)])
    for file, what, along in kinds:
        rows = [Row(s.variant, along(s).kls, along(s).kl, kl_text(along(s))) for s in shifts]
        if any(row.values for row in rows):
            yield _own(
                file,
                f"Histograms: KL from the original along {what}",
                f"KL(original || variant) per token along {what}: one value per prompt, n = {prompts}, "
                f"{along(shifts[0]).n_tokens:,} tokens. Line: the mean over tokens, with its 95% interval.",
                _histograms(rows, names, top, "KL from the original (nats per token)"),
            )
    rows = [_similarities(s) for s in shifts]
    if any(row.values for row in rows):
        yield _own(
            "similarity.png",
            "Histograms: similarity of greedy answers to the original's",
            f"Similarity of each variant's greedy answer to the original's; n = {prompts}; 1: the same. Line: mean.",
            _histograms(rows, names, 1.0, f"similarity ({shifts[0].similarity_by})"),
        )


@dataclass(frozen=True)
class Row:
    """One panel of histograms: a value per prompt, their mean (None: there is none), and the mean in words."""

    variant: Variant
    values: list[float]
    mean: float | None
    words: str


def _similarities(shift: Shift) -> Row:
    values = shift.similarities
    mean = sum(values) / len(values) if values else None
    return Row(shift.variant, values, mean, NA if mean is None else f"{mean:.3f}")


def _histograms(rows: Sequence[Row], names: dict[str, str], top: float, unit: str) -> Callable[[], Figure]:
    return lambda: histograms(rows, names, top, unit)


def histograms(rows: Sequence[Row], names: dict[str, str], top: float, unit: str) -> Figure:
    """One panel per variant over the same axis from 0 to `top`: how many prompts, and the mean in words."""
    figure = blank(WIDTH, 0.5 + 0.82 * len(rows), len(rows))
    most = 1.0
    for axes, row in zip(figure.axes, rows, strict=True):
        colour = COLOURS.get(row.variant.arm, MUTED)
        values = [max(0.0, value) for value in row.values]  # rounding leaves a KL of nought below the axis
        counts, _, _ = axes.hist(values, bins=BARS, range=(0, top), color=colour, alpha=0.85, rwidth=0.92)
        most = max(most, *counts)
        if row.mean is not None:
            axes.axvline(row.mean, color="black", linewidth=1.2)
        axes.set_title(names[row.variant.id], fontsize=9.5)
        axes.set_title(f"mean {row.words}", loc="right", fontsize=9)
    for axes in figure.axes:
        axes.set_xlim(0, top)
        axes.set_ylim(0, 1.08 * most)
        axes.set_yticks([0, most], ["0", f"{most:.0f}"], fontsize=8.5)
        axes.tick_params(labelbottom=axes is figure.axes[-1])
    figure.axes[-1].set_xlabel(unit, fontsize=9)
    figure.supylabel("prompts", fontsize=9)
    return figure


def _own(file: str, words: str, caption: str, make: Callable[[], Figure]) -> Picture:
    return Picture(file, words, caption, make, make)


def _over(results: Results) -> str:
    found = counted(results)
    if not found:
        return "No task counts: the original clears chance on none, so that recovery is n/a."
    return (
        f"Over {plural(len(found), 'task')} ({', '.join(label(results, t) for t in found)}), {at_n(found)} documents."
    )
