"""The pictures of single stages (scan, rewrite, train), as PNG files. matplotlib is imported when one is drawn."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd.records import (
    BlockScores,
    Candidate,
    Example,
    PrunePlan,
    Rewrite,
    Scan,
    TrainReport,
    spelled,
)
from hfsd.text import plural

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One accent per arm, from Okabe and Ito's palette (told apart with every kind of colour vision); the Space uses it too.
COLOURS = {
    "original": "#0072B2",
    "pruned": "#E69F00",
    "sft": "#CC79A7",
    "self-distilled": "#009E73",
    "sdd+kd": "#8C6D1F",
    "on-policy": "#5B4B8A",
    "merged": "#56B4E9",
}
CHOICE = "#D55E00"  # vermilion, used for nothing else: the cut that was made
MUTED = "#767676"
NAME_WIDTH = 30  # characters of a range and who proposed it, before it is wrapped
METRICS = {"angular": "angular distance (0 to 1)", "bi": "block influence (1 - cosine)"}
STYLE: Any = {
    "text.parse_math": False,  # names may hold a dollar sign
    "font.size": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def draw_rewrites(pairs: Sequence[tuple[Example, Rewrite]], out: Path) -> None:
    """`shift.png`: how long, how like and how likely the rewrites are beside their references."""
    save({"shift.png": lambda: rewrite_shift(pairs)}, out)


def draw_loss(training: Sequence[TrainReport], out: Path) -> None:
    """`loss.png`: the training loss over the steps."""
    if any(t.losses for t in training):
        save({"loss.png": lambda: loss(training)}, out)


def draw_scan(scores: BlockScores, scan: Scan | None, out: Path) -> None:
    """`scores.png`, the heat map, with a scan's choice marked; `losses.png`, its verified candidates' losses."""
    files: dict[str, Callable[[], Figure]] = {"scores.png": lambda: block_scores(scores, scan.plan if scan else None)}
    if scan and scan.candidates:
        files["losses.png"] = lambda: candidates(scan, scan.plan)
    save(files, out)


def block_scores(scores: BlockScores, plan: PrunePlan | None) -> Figure:
    """Heat map of scores over start and width, or a line per width where few were scored; the removed blocks marked."""
    cuts = _runs(plan.removed) if plan else []
    widths = sorted(scores.values)
    if len(widths) < 4:
        return _score_lines(scores, cuts)
    n_layers = max(w + len(scores.values[w]) for w in widths) - 1
    figure = blank(7.6, 5.4)
    axes = figure.axes[0]
    grid = [[_at(scores.values[w], s) for s in range(n_layers)] for w in widths]
    step = widths[1] - widths[0]
    extent = (-0.5, n_layers - 0.5, widths[0] - step / 2, widths[-1] + step / 2)
    image = axes.imshow(grid, origin="lower", aspect="auto", cmap="cividis", extent=extent, interpolation="nearest")
    figure.colorbar(
        image, ax=axes, label=f"{METRICS.get(scores.metric, scores.metric)}; lower is safer to remove", pad=0.02
    )
    lowest = [min(range(len(scores.values[w])), key=scores.values[w].__getitem__) for w in widths]
    axes.plot(lowest, widths, ".", color="white", markersize=5)
    for start, stop in cuts:
        if stop - start in scores.values:
            for colour, width in (("white", 3.6), (CHOICE, 2.0)):
                _circle(axes, start, stop - start, colour, width)
    axes.set_xlabel("start: first block of the range, counted from 0")
    axes.set_ylabel("width: blocks in the range")
    marked = f"; circled: removed, {plan and spelled(plan.removed)}" if cuts else ""
    axes.set_title(f"{_score_title(scores)}\nwhite dots: lowest of each width{marked}")
    _whole_numbers(axes.xaxis, axes.yaxis)
    return figure


def rewrite_shift(pairs: Sequence[tuple[Example, Rewrite]]) -> Figure:
    """Histograms over all rewrites: lengths, their ratio, similarity and, where measured, perplexity.

    Perplexity, that of the original, is drawn on the scale of its logarithm, the loss in nats per token.
    """
    rewrites = [r for _, r in pairs]
    both = [(r.reference_nats, r.nats) for r in rewrites if r.reference_nats is not None and r.nats is not None]
    figure = blank(7.6, 8.4 if both else 6.2, 4 if both else 3)
    length, ratio, similarity, *likelihood = figure.axes
    sizes = [(len(e.reference), len(r.text)) for e, r in pairs]
    top = _high(sizes)
    _two_histograms(
        length, [(min(a, top), min(b, top)) for a, b in sizes], top, [f"mean {m:,.0f}" for m in _means(sizes)]
    )
    length.set_xlabel(f"characters ({top:,}: {top:,} and more)")
    growth = [b / max(1, a) for a, b in sizes]
    ratio.hist([min(g, 4.0) for g in growth], bins=40, range=(0, 4), color=COLOURS["self-distilled"])
    ratio.set_xlabel("characters of the rewrite over those of the reference (4: 4 and more)")
    similarity.hist([r.similarity for r in rewrites], bins=40, range=(0, 1), color=COLOURS["self-distilled"])
    similarity.set_xlabel("similarity of rewrite and reference (0 to 1)")
    for axes in likelihood:
        _perplexity(axes, both)
    for axes in figure.axes:
        axes.set_ylabel("rows")
    length.set_title(f"How far the original's words are from the references ({plural(len(pairs), 'row')}, used or not)")
    return figure


def _two_histograms(axes: Any, pairs: Sequence[tuple[float, float]], top: float, told: Sequence[str]) -> None:
    """References and rewrites on one axis from 0 to `top`, with what is told of each."""
    for at, (name, arm) in enumerate((("references", "sft"), ("rewrites", "self-distilled"))):
        values, label = [pair[at] for pair in pairs], f"{name}, {told[at]}"
        axes.hist(values, bins=40, range=(0, top), alpha=0.65, color=COLOURS[arm], label=label)
    axes.legend(frameon=False)


def _means(pairs: Sequence[tuple[float, float]]) -> list[float]:
    return [sum(side) / len(side) for side in zip(*pairs, strict=True)]


def _perplexity(axes: Any, nats: Sequence[tuple[float, float]]) -> None:
    """Losses of references and rewrites, ticked with the perplexities below and with the losses above."""
    top = max(1e-3, max(max(pair) for pair in nats)) * 1.02
    _two_histograms(axes, nats, top, [f"mean loss {m:.2f} nats (perplexity {math.exp(m):,.1f})" for m in _means(nats)])
    axes.set_xlim(0, top)
    marks = [m * 10**power for power in range(1 + int(top / math.log(10))) for m in (1, 2, 5)]
    marks = [m for m in marks if math.log(m) <= top]
    step = math.ceil(len(marks) / 12)
    axes.set_xticks([math.log(m) for m in marks[::step]], [f"{m:,}" for m in marks[::step]])
    axes.set_xlabel("perplexity under the original, given the prompt alone")
    axes.secondary_xaxis("top").set_xlabel("loss (nats per token)", fontsize=9)


def _high(sizes: Sequence[tuple[int, int]]) -> int:
    """An end of the axis that leaves no more than 2% of the values behind it."""
    values = sorted(n for pair in sizes for n in pair)
    return max(1, values[math.ceil(0.98 * len(values)) - 1])


def candidates(scan: Scan, plan: PrunePlan) -> Figure:
    """Held-out loss of the model without each verified range, best first, beside the original's."""
    greedy = scan.candidates[0].proposed_by.startswith("greedy")
    ranked = scan.candidates if greedy else sorted(scan.candidates, key=lambda c: (c.loss, c.removed))
    names = [_candidate_name(c, greedy) for c in ranked]
    figure = blank(7.6, 1.5 + 0.2 * sum(1 + n.count("\n") for n in names) + 0.13 * len(names))
    axes = figure.axes[0]
    for y, candidate in enumerate(ranked):
        chosen = candidate.removed == plan.removed
        colour = CHOICE if chosen else MUTED
        axes.plot([scan.original_loss, candidate.loss], [y, y], color=colour, linewidth=1.6)
        axes.plot(candidate.loss, y, "o", color=colour, markersize=8 if chosen else 6)
        words = f"{candidate.loss:.3f}{'  removed' if chosen else ''}"
        axes.annotate(words, (candidate.loss, y), xytext=(9, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(scan.original_loss, color=COLOURS["original"], linewidth=1.6)
    axes.set_yticks(range(len(ranked)), names)
    axes.set_ylim(len(ranked) - 0.4, -0.6)
    losses = [*(c.loss for c in ranked), scan.original_loss]
    span = max(max(losses) - min(losses), 1e-3)
    axes.set_xlim(min(losses) - 0.04 * span, max(losses) + 0.25 * span)
    axes.set_xlabel("loss on held-out calibration text (nats per token)")
    axes.set_ylabel("block removed in each step" if greedy else "range (proposed by)")
    what = "after each step of the greedy search" if greedy else "without each verified range"
    axes.set_title(f"Loss {what}; the line is the original's {scan.original_loss:.3f}")
    axes.grid(axis="x", color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure


def loss(training: Sequence[TrainReport]) -> Figure:
    """Training loss of every arm over optimizer steps."""
    figure = blank(7.6, 4.2)
    axes = figure.axes[0]
    styles = ("-", "--", ":", "-.")
    drawn: dict[str, int] = {}
    for report in (t for t in training if t.losses):
        arm = report.variant.arm
        style = styles[drawn.setdefault(arm, 0) % len(styles)]
        drawn[arm] += 1
        steps, values = zip(*report.losses, strict=True)
        name = f"{report.variant.id} ({plural(report.rows, 'row')}, {report.tokens:,} trained tokens)"
        dots = "o" if len(steps) < 3 else ""
        axes.plot(steps, values, linestyle=style, marker=dots, color=COLOURS.get(arm, MUTED), linewidth=1.8, label=name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("training loss (nats per completion token)")
    axes.set_title("Training loss; the arms learn different answers, so that their levels do not compare")
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.legend(loc="lower left", edgecolor="none", framealpha=0.9)
    axes.set_ylim(bottom=0)
    _whole_numbers(axes.xaxis)
    return figure


def chosen_scores(scan: Scan, plan: PrunePlan) -> BlockScores:
    """The scores that proposed the cut; where none is named, those over all tokens, else the first."""
    proposers = [plan.why, *(c.proposed_by for c in scan.candidates if c.removed == plan.removed)]
    named = [k for k in sorted(scan.scores) if any(f"{k} tokens" in p for p in proposers)]
    key = "all" if "all" in scan.scores and (not named or "all" in named) else (named or sorted(scan.scores))[0]
    return scan.scores[key]


@contextmanager
def style() -> Iterator[None]:
    """Our settings of matplotlib, for as long as a picture is drawn and saved."""
    import matplotlib

    # a user's own matplotlibrc must not change a report
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def blank(width: float, height: float, rows: int = 1) -> Figure:
    """A figure outside pyplot: no window, no global state; saving it to PNG uses Agg."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    figure.subplots(rows, 1, squeeze=False)
    return figure


def _runs(blocks: Sequence[int]) -> list[tuple[int, int]]:
    """Ascending blocks as half-open ranges: (3, 7, 8) -> [(3, 4), (7, 9)]."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and runs[-1][1] == block:
            runs[-1] = (runs[-1][0], block + 1)
        else:
            runs.append((block, block + 1))
    return runs


def _at(values: Sequence[float], start: int) -> float:
    return values[start] if start < len(values) else float("nan")  # no such range: left white


def _score_title(scores: BlockScores) -> str:
    which = "last text token" if scores.tokens == "last" else f"{scores.tokens} text tokens"
    counts = f"n = {scores.samples} sequences, {scores.n_tokens:,} tokens"
    return f"How far each range of blocks moves the residual stream\n({which}; {counts})"


def _score_lines(scores: BlockScores, cuts: Sequence[tuple[int, int]]) -> Figure:
    figure = blank(7.6, 4.2)
    axes = figure.axes[0]
    for (width, values), style in zip(sorted(scores.values.items()), ("-", "--", ":"), strict=False):
        starts, name = range(len(values)), plural(width, "block")
        axes.plot(starts, values, linestyle=style, marker="o", markersize=4, color="#333333", label=name)
        for start in (start for start, stop in cuts if stop - start == width):
            _circle(axes, start, values[start], CHOICE, 2.0)
    axes.set_xlabel("start: first block of the range, counted from 0")
    axes.set_ylabel(METRICS.get(scores.metric, scores.metric))
    axes.set_title(_score_title(scores))
    axes.legend(frameon=False, title="width of the range")
    _whole_numbers(axes.xaxis)
    return figure


def _circle(axes: Any, x: float, y: float, colour: str, width: float) -> None:
    axes.plot(x, y, "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)


def _candidate_name(candidate: Candidate, greedy: bool) -> str:
    if greedy:
        return candidate.blocks
    return textwrap.fill(f"{candidate.blocks} ({candidate.proposed_by})", NAME_WIDTH)


def save(files: dict[str, Callable[[], Figure]], out: Path) -> None:
    """Draws every picture in our style, into the file of its name."""
    out.mkdir(parents=True, exist_ok=True)
    for name, make in files.items():
        with style():
            # without the metadata the bytes would change with the version of matplotlib
            make().savefig(out / name, format="png", dpi=150, metadata={"Software": None})


def _whole_numbers(*sides: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    for side in sides:
        side.set_major_locator(MaxNLocator(integer=True, nbins=12))
