"""Results as words and tables, in one way for the report, the cards and the command line. All of it is plain text.

What is said of differences, of data sets and of running a model lies in modules of its own, and is found here too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hfsd.differences import (
    PAIRED_NOTE,
    at_n,
    counted,
    difference_text,
    in_percent,
    label,
    line_of,
    on_text,
    paired_table,
    score_text,
)
from hfsd.findings import Along, Estimate, Paired, Results, Shift, TaskSummary, VariantSummary
from hfsd.records import STAGES, Variant
from hfsd.running import cost_notes, cost_table, draft_notes, draft_table
from hfsd.stats import RESAMPLES, key_of, over_prompts, over_seeds
from hfsd.trainsets import REASONS, data_sentence, reasons_table, train_set_of
from hfsd.units import NA, count, duration, estimate_text, p_text, percent, plural, size

__all__ = [
    "NA",
    "PAIRED_NOTE",
    "REASONS",
    "at_n",
    "cost_notes",
    "cost_table",
    "count",
    "counted",
    "cut_text",
    "data_sentence",
    "difference_text",
    "draft_notes",
    "draft_table",
    "duration",
    "estimate_text",
    "headline",
    "in_percent",
    "kl_text",
    "label",
    "line_of",
    "losses",
    "notes",
    "paired_table",
    "percent",
    "plural",
    "reasons_table",
    "recovery_text",
    "score_text",
    "seeds_table",
    "setups",
    "size",
    "stages",
    "table",
    "train_set_of",
    "verdicts",
]


def kl_text(along: Along) -> str:
    """KL from the original in nats per token, with its 95% interval over prompts."""
    return estimate_text(over_prompts(along.kl, along.kl_stderr, along.prompts), places=3)


def table(results: Results) -> list[list[str]]:
    """Header row, then one row per variant: tasks, mean, both recoveries, KL, parameters, seconds of training.

    Scores print with 95% intervals, shares in percent. Cells are plain text: `markdown.table` escapes them.
    """
    heads = []
    for task in results.tasks:
        unit = "%" if in_percent(task) else f"{task.metric}{'' if task.higher_is_better else ', lower is better'}"
        heads.append(f"{label(results, task)} {unit if unit == '%' else f'({unit})'}")
    last = ["mean %", "recovery %", "chance-corrected %", "KL (nats)", "parameters", "training s"]
    rows = [["variant", *heads, *last]]
    for line in results.variants:
        scores = [score_text(t.scores[line.variant.id], in_percent(t)) for t in results.tasks]
        rows.append(
            [
                line.variant.id,
                *scores,
                estimate_text(line.mean, 100),
                *(_against_itself(line, e) for e in (line.recovery, line.chance_corrected)),
                kl_text(line.shift.sampled) if line.shift else "-",
                count(line.params),
                "-" if line.train_seconds is None else f"{line.train_seconds:.0f}",
            ]
        )
    return rows


def _against_itself(line: VariantSummary, found: Estimate | None) -> str:
    if found and line.variant.arm == "original":
        return f"{found.value:.1f}"  # 100 by definition: an interval would say nothing
    return estimate_text(found)


def notes(results: Results) -> list[str]:
    """What stands under the table: how every task was asked, which ones do not count and why, what the numbers are."""
    lines = setups(results)
    lines.append(
        "In brackets: 95% intervals. A score's is as if other documents had been asked (Wilson's for shares, 1.96 "
        "standard errors otherwise), and the mean's is made of its tasks'. Recovery is the variant's mean over the "
        "original's, chance-corrected takes chance from both before; their intervals are of a paired bootstrap over "
        f"documents ({RESAMPLES:,} draws; tasks with the same documents are drawn together)."
    )
    if len(counted(results)) > 1:
        lines += _of_each(results, "Mean of the tasks' own recoveries instead, in percent", lambda v: v.mean_of_ratios)
    known = {(p.task, p.metric, p.filter) for p in results.paired}
    unknown = [label(results, t) for t in results.tasks if key_of(t) not in known]
    if unknown and len(results.variants) > 1:
        lines.append(f"{', '.join(unknown)}: no paired interval, since the score is no mean over documents.")
    lines += _shift_notes([line.shift for line in results.variants if line.shift])
    return lines


def setups(results: Results) -> list[str]:
    """How every task was asked, and why it does not count where it does not; then what all tasks share, said once."""
    asked = [_asked(task) for task in results.tasks]
    alike = [set(parts) - {""} for parts in zip(*asked, strict=True)]  # a task without shots says nothing of them
    lines = []
    for task, parts in zip(results.tasks, asked, strict=True):
        own = [part for part, all_ in zip(parts, alike, strict=True) if part and len(all_) > 1]
        lines.append(_task_note(results, task, own))
    common = [part for parts in alike if len(parts) == 1 for part in parts]
    return [*lines, f"All tasks: {', '.join(common)}."] if common else lines


def _task_note(results: Results, task: TaskSummary, asked: Sequence[str]) -> str:
    facts = [task.metric, f"n = {task.n}", plural(task.shots, "shot")]
    facts.append("no chance level" if task.chance is None else f"chance {percent(task.chance)}")
    facts += [*asked, *([f"local data: {task.setup.data}"] if task.setup.data else [])]
    verdict = "counts in the mean" if task.in_mean else f"not in the mean: {task.note}"
    kept_apart = "" if task.setup.comparable else "; not comparable with the leaderboard"
    remarks = "".join(f"; {remark}" for remark in task.remarks)
    return f"{label(results, task)}: {', '.join(facts)}; {verdict}{kept_apart}{remarks}."


def _asked(task: TaskSummary) -> tuple[str, ...]:
    """How a task was asked, one part per place; what says nothing of this task is empty."""
    setup = task.setup
    turns = "each shot a turn of the chat" if setup.multiturn else "shots in one text with the question"
    drawn = (
        "drawn by the task's own sampler" if setup.fewshot == "drawn" else "fixed: the first ones for every question"
    )
    return (
        f"engine {setup.engine}",
        "all documents" if setup.limit is None else f"limit {plural(setup.limit, 'document')}",
        "in the chat template" if setup.chat_template else "without a chat template",
        turns if task.shots else "",
        f"shots {drawn}" if task.shots else "",
        f"seed {setup.seed}",
    )


def _of_each(results: Results, what: str, number: Callable[[VariantSummary], Estimate | None]) -> list[str]:
    told = [
        f"{line.variant.id} {estimate_text(number(line))}"
        for line in results.variants
        if line.variant.arm != "original"
    ]
    return [f"{what}: {'; '.join(told)}."] if told else []


def _shift_notes(shifts: Sequence[Shift]) -> list[str]:
    if not shifts:
        return []
    first = shifts[0]
    along = f"{plural(first.sampled.prompts, 'held-out prompt')} ({first.sampled.n_tokens:,} tokens)"
    tokens = f"{first.references.n_tokens:,} tokens"
    references = "; ".join(f"{s.variant.id} {kl_text(s.references)}" for s in shifts)
    return [
        f"KL is KL(original || variant) per token along the original's own sampled answers to {along}; its intervals "
        "are over prompts (Student's t).",
        f"KL along the references, which the original would not say ({tokens}): {references}.",
    ]


def cut_text(results: Results) -> str:
    """`6 of 32 blocks (16.30% of the parameters, 17.44% of the matmul FLOPs per token)`."""
    gone = len(results.plan.removed)
    return (
        f"{gone} of {results.plan.n_layers} blocks ({100 * results.param_cut:.2f}% of the parameters, "
        f"{100 * results.matmul_flop_cut:.2f}% of the matmul FLOPs per token)"
    )


def recovery_text(results: Results, line: VariantSummary) -> str:
    """`93.4% [88.1, 101.2] of the original's mean score (63.4 against 67.9 over 2 tasks, n = 200; 88.0% [...]
    chance-corrected)`."""
    tasks, original = counted(results), line_of(results, "original")
    if line.mean is None or original is None or original.mean is None:
        return "an unknown share of the original's score, since no task qualifies for the mean"
    return (
        f"{_recovered(line.recovery)} of the original's mean score ({100 * line.mean.value:.1f} against "
        f"{100 * original.mean.value:.1f} over {plural(len(tasks), 'task')}, {at_n(tasks)}; "
        f"{_recovered(line.chance_corrected)} chance-corrected)"
    )


def _recovered(found: Estimate | None) -> str:
    return estimate_text(found, unit="%")


def headline(results: Results) -> str:
    """The answer in one sentence, and what the intervals allow to be said about it. Plain text."""
    removed = f"Removing {cut_text(results)}"
    if not counted(results):
        said = f"{removed} cannot be judged by recovery: the original clears chance on no task, so that none counts."
        return " ".join([said, *verdicts(results)])
    pruned = line_of(results, "pruned")
    said = f"{removed} leaves {_recovered(pruned.recovery)} of the original's mean score" if pruned else removed
    arms = [v for v in results.variants if v.variant.arm not in ("original", "pruned")]
    brought = [
        f"{v.variant.id} {_recovered(v.recovery)} ({_recovered(v.chance_corrected)} chance-corrected)" for v in arms
    ]
    if brought:
        said += f"; after training, {' and '.join(brought)}" if pruned else f": {' and '.join(brought)}"
    return " ".join([f"{said}.", *verdicts(results)])


def verdicts(results: Results, variant_id: str | None = None) -> list[str]:
    """Sentences that compare each arm with sft of its data and seed, with the pruned model, or with its parts.

    One sentence per pair: in the mean over the tasks that count or, where there is none, task by task. "Better" and
    "worse" stand only where the paired difference allows it (`hfsd.paired`). With an id: all those of that variant;
    without, an arm that is compared with sft has one sentence, and the table has the rest.
    """
    met: dict[tuple[str, str], list[Paired]] = {}
    for found in results.paired:
        first = line_of(results, found.first)
        mine = variant_id in (None, found.first, found.second)
        if mine and found.second != "original" and first and first.variant.arm != "sft":
            met.setdefault((found.first, found.second), []).append(found)
    if variant_id is None:
        beside = {first for first, second in met if second != "pruned"}
        met = {pair: found for pair, found in met.items() if pair[1] != "pruned" or pair[0] not in beside}
    return [_verdict(results, found) for found in met.values()]


def _verdict(results: Results, found: Sequence[Paired]) -> str:
    mean, keys = [p for p in found if p.task is None], [key_of(t) for t in counted(results)]
    parts = "; ".join(f"{on_text(results, p)} {difference_text(results, p)}" for p in mean or found)
    exact = [p for p in found if (p.task, p.metric, p.filter) in keys and p.test == "McNemar"]
    if exact and mean and mean[0].test != "McNemar":
        parts += f"; McNemar by task: {', '.join(f'{p.task} {p_text(p.p)}' for p in exact)}"
    return f"{found[0].first} - {found[0].second}: {parts}."


def seeds_table(results: Results) -> list[list[str]]:
    """Header row, then one row per arm and data set that was trained with several seeds; empty where none was."""
    found = over_seeds(results.variants)
    rows = [
        [
            Variant(s.arm, s.data).id,
            ", ".join(map(str, s.seeds)),
            f"{100 * s.mean:.1f} ± {100 * s.mean_sd:.1f}",
            NA if s.recovery is None else f"{s.recovery:.1f} ± {s.recovery_sd:.1f}",
        ]
        for s in found
    ]
    return [["arm", "seeds", "mean %", "recovery %"], *rows] if rows else []


def losses(results: Results, variant_id: str) -> list[str]:
    """Task by task, what a variant lost against the original, as far as the paired differences tell. Plain text."""
    lines = []
    found = {(p.task, p.metric, p.filter): p for p in results.paired if (p.first, p.second) == (variant_id, "original")}
    for task in results.tasks:
        mine, theirs = (score_text(task.scores[v], in_percent(task)) for v in (variant_id, "original"))
        unit = "%" if in_percent(task) else task.metric
        pair = found.get(key_of(task))
        verdict = difference_text(results, pair) if pair else "not compared, since the score is no mean over documents"
        lines.append(f"{label(results, task)} ({unit}): {mine} against {theirs}; {verdict}.")
    return lines


def stages(results: Results) -> list[tuple[str, float]]:
    """Seconds per step (`scan`, `train/VARIANT`) in run order, whatever order the record was read in."""
    ids = [v.variant.id for v in results.variants]

    def place(step: tuple[str, float]) -> tuple[int, int, str]:
        stage, _, variant = step[0].partition("/")
        at = STAGES.index(stage) if stage in STAGES else len(STAGES)
        return at, ids.index(variant) if variant in ids else -1, step[0]

    return sorted(results.stage_seconds.items(), key=place)
