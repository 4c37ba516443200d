"""Tables and lines that only the report has, in plain text: report.md and index.html show the same."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence

from hfsd.findings import Estimate, Results, VariantSummary
from hfsd.plain import printable
from hfsd.text import NA, count, counted, duration, estimate_text, kl_text, label, percent, size, stages

Table = list[list[str]]
SHOWN_ANSWERS = 20
SHOWN_CHARS = 1500
SHIFT_NOTE = (
    "KL is KL(original || variant) in nats per token, with 95% intervals over prompts (Student's t); top-1 is the "
    "share of tokens where both put the same one first. Along sampled and greedy: texts of the original's own; "
    "references: texts that it would not say. Similarity is that of the greedy answers to the original's, in the mean "
    "over prompts."
)


def recovery_table(results: Results) -> Table:
    """Header row, then recovery and chance-corrected recovery with intervals, per task and over those that count."""
    lines = [v for v in results.variants if v.variant.arm != "original"]
    if not lines:
        return []
    rows = [["recovery, %", *(v.variant.id for v in lines)]]
    kinds: list[tuple[str, Callable[[VariantSummary], Estimate | None]]] = [
        ("all: ratio of means", lambda v: v.recovery),
        ("all: mean of ratios", lambda v: v.mean_of_ratios),
        ("all: ratio of means, chance-corrected", lambda v: v.chance_corrected),
    ]
    rows += [[name, *(estimate_text(of(v)) for v in lines)] for name, of in kinds]
    for task in counted(results):
        scores = [task.scores[v.variant.id] for v in lines]
        rows.append([label(results, task), *(estimate_text(s.recovery) for s in scores)])
        if task.chance is not None:
            rows.append([f"{rows[-1][0]}, chance-corrected", *(estimate_text(s.chance_corrected) for s in scores)])
    return rows


def shift_table(results: Results) -> Table:
    """Header row, then one row per variant that was compared with the original; empty where none was."""
    rows = [
        [
            s.variant.id,
            *(cell for along in (s.sampled, s.greedy, s.references) for cell in (kl_text(along), percent(along.top1))),
            f"{sum(s.similarities) / len(s.similarities):.3f}" if s.similarities else NA,
        ]
        for s in (v.shift for v in results.variants)
        if s
    ]
    by = next((v.shift.similarity_by for v in results.variants if v.shift), "")
    heads = [f"{what}, {kind}" for kind in ("sampled", "greedy", "references") for what in ("KL", "top-1")]
    return [["variant", *heads, f"similarity ({by})"], *rows] if rows else []


def training_table(results: Results) -> Table:
    """Header row, then what every trained arm took; empty where none was trained."""
    if not results.training:
        return []
    return [
        ["", *(t.variant.id for t in results.training)],
        ["method", *(t.method for t in results.training)],
        ["run by", *(t.engine for t in results.training)],
        ["rows", *(str(t.rows) for t in results.training)],
        ["optimizer steps", *(str(t.steps) for t in results.training)],
        ["trained tokens", *(f"{t.tokens:,}" for t in results.training)],
        ["last loss (nats per token)", *(f"{t.losses[-1][1]:.3f}" if t.losses else "-" for t in results.training)],
        ["trained parameters", *(count(t.trained_params) for t in results.training)],
        ["time of the last process", *(duration(t.seconds) for t in results.training)],
        ["peak memory of the process so far", *(size(t.peak_bytes) for t in results.training)],
    ]


def hyperparameters_table(results: Results) -> Table:
    """Header row, then every hyperparameter of every trained arm, and what the arms must share; empty without any."""
    told = [printable({**t.hyperparameters, "shared": t.fairness}) for t in results.training]
    names = sorted({name for settings in told for name in settings})
    rows = [[name, *(settings.get(name, "-") for settings in told)] for name in names]
    return [["", *(t.variant.id for t in results.training)], *rows] if rows else []


def steps_table(results: Results) -> Table:
    """Header row, then wall time per step in run order, and of all; empty where none is known.

    A step that was killed and went on counts what its last process took.
    """
    rows = [[step, duration(seconds)] for step, seconds in stages(results)]
    every = ["all", duration(sum(results.stage_seconds.values()))]
    return [["step", "wall time of the last process"], *rows, every] if rows else []


def saved(results: Results) -> str:
    """What the cut saves, in one sentence."""
    params, flops = (f"{100 * share:.2f}%" for share in (results.param_cut, results.matmul_flop_cut))
    # an embedding that is only looked up, norms, experts that are not asked
    why = "" if params == flops else " (two numbers: not every parameter is multiplied with every token)"
    return f"The cut saves {params} of the parameters and {flops} of the matmul FLOPs per token{why}."


def facts(results: Results) -> Table:
    """(what, value) rows: the original, then the results' facts by name."""
    ref = results.original
    found = [("original", ref.repo), ("parameters of the original", f"{results.original_params:,}")]
    if ref.revision:
        found.insert(1, ("revision of the original", ref.revision))
    told = {name: value for name, value in results.facts.items() if name != "limits"}  # pages of text, for the cards
    return [list(row) for row in (*found, *sorted(printable(told).items()))]


def commands(results: Results) -> list[tuple[str, str]]:
    """(what it is for, command line): the run, its cut alone, and what reads a finished run."""
    run = shlex.quote(f"runs/{results.name}")
    found = [
        ("What it will need, without any weights", "hfsd plan recipe.yaml"),
        ("All of it; run again after an interruption, it goes on where it was", f"hfsd run recipe.yaml --out {run}"),
    ]
    if results.plan.removed:
        # by kept blocks, since any cut can be said so
        ref = results.original
        command = f"hfsd prune {shlex.quote(ref.repo)} --keep {_kept(results.plan.kept)} --out cut"
        if ref.revision and not ref.revision.startswith("sha256:"):
            command += f" --set model.revision={ref.revision}"
        found.append(("The cut alone, without a scan", command))
    found += [
        ("The closing table of the finished run", f"hfsd report {run}"),
        ("Its variants side by side, in a browser", f"hfsd space {run}"),
    ]
    return found


def _kept(blocks: Sequence[int]) -> str:
    """`0:4,8:30`: kept blocks as half-open ranges, as `hfsd prune --keep` takes them."""
    starts = [b for b in blocks if b - 1 not in blocks]
    stops = [b + 1 for b in blocks if b + 1 not in blocks]
    return ",".join(f"{a}:{b}" if b - a > 1 else str(a) for a, b in zip(starts, stops, strict=True))
