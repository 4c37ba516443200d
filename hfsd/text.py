"""Results as words and tables, in one way for the report, the cards and the command line. All of it is plain text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hfsd.records import STAGES, Results, Shift, TaskScore, TaskSummary, TrainSet, Variant, VariantSummary
from hfsd.stats import Z95, compare, is_share, over_seeds

NA = "n/a"
REASONS = {
    "kept": "the original's own words are used",
    "wrong answer": "the final answers differ",
    "truncated": "cut off by the token limit",
    "echo": "repeats a heading of the prompt",
    "too long": "much longer than the reference",
    "unlike": "has too little in common with the reference",
    "unlikely": "less likely under the original than the reference",
    "leak": "speaks of the reference or of the task of responding",
    "empty": "no text came",
    "failed": "the engine gave up on the row",
}


def count(n: int) -> str:
    """A number of parameters: `134.5 M`, `8.030 B`."""
    if n >= 1_000_000_000:
        return f"{n / 1e9:.3f} B"
    return f"{n / 1e6:.1f} M" if n >= 1_000_000 else f"{n:,}"


def size(n: float) -> str:
    """Bytes in powers of 1000: `1.24 GB`."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def duration(seconds: float) -> str:
    """Wall time: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{left} s"
    return f"{minutes} min {left:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plural(n: int, word: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def percent(share: float | None) -> str:
    """A share as `43.5%`."""
    return NA if share is None else f"{100 * share:.1f}%"


def recovered(value: float | None) -> str:
    """A recovery, which is in percent already: `93.4%`."""
    return NA if value is None else f"{value:.1f}%"


def in_percent(task: TaskSummary) -> bool:
    """Whether a task's scores are shares of documents, and print in percent."""
    return is_share(task.metric, task.chance, task.higher_is_better)


def number(value: float, share: bool) -> str:
    """A score in the unit in which its task prints: percent without the sign, or the task's own."""
    return f"{100 * value:.1f}" if share else f"{value:.3f}"


def score_text(score: TaskScore, share: bool) -> str:
    """`61.0 [54.1, 67.5]`: a score and its 95% interval."""
    text = number(score.value, share)
    if score.low is None or score.high is None:
        return f"{text} [no interval]"
    return f"{text} [{number(score.low, share)}, {number(score.high, share)}]"


def kl_text(shift: Shift | None) -> str:
    """KL from the original with its 95% interval, in nats per token."""
    if shift is None:
        return "-"
    half = Z95 * shift.kl_stderr
    return f"{shift.kl:.3f} [{max(0.0, shift.kl - half):.3f}, {shift.kl + half:.3f}]"


def label(results: Results, task: TaskSummary) -> str:
    """The task's name, with metric and filter where the name alone would not tell."""
    same = [t for t in results.tasks if t.task == task.task]
    parts = [task.task]
    if len({t.metric for t in same}) > 1:
        parts.append(task.metric)
    if len({t.filter for t in same}) > 1:
        parts.append(task.filter)
    return " ".join(parts)


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
        mean = mean_of(line)
        rows.append(
            [
                line.variant.id,
                *scores,
                score_text(mean, True) if mean else NA,
                NA if line.recovery is None else f"{line.recovery:.1f}",
                NA if line.chance_corrected is None else f"{line.chance_corrected:.1f}",
                kl_text(line.shift),
                count(line.params),
                "-" if line.train_seconds is None else f"{line.train_seconds:.0f}",
            ]
        )
    return rows


def notes(results: Results) -> list[str]:
    """What stands under the table: n, chance and shots of every task, which ones do not count and why. Plain text."""
    lines = []
    for task in results.tasks:
        facts = [task.metric, f"n = {task.n}", plural(task.shots, "shot")]
        facts.append("no chance level" if task.chance is None else f"chance {percent(task.chance)}")
        verdict = "counts in the mean" if task.in_mean else f"not in the mean: {task.note}"
        lines.append(f"{label(results, task)}: {', '.join(facts)}; {verdict}.")
    lines.append(
        "In brackets: 95% intervals (Wilson for shares; the mean's is the mean of its tasks' bounds). Recovery is the "
        "variant's mean over the original's; chance-corrected takes chance from both before."
    )
    if any(line.shift for line in results.variants):
        shift = next(line.shift for line in results.variants if line.shift)
        lines.append(
            f"KL is KL(original || variant) per token of the original's own greedy answers to "
            f"{plural(shift.prompts, 'held-out prompt')} ({shift.n_tokens} tokens)."
        )
    return lines


def mean_of(line: VariantSummary) -> TaskScore | None:
    """The mean of a variant in the form of a score."""
    if line.mean is None:
        return None
    return TaskScore(line.mean, line.mean_low, line.mean_high, line.recovery, line.chance_corrected)


def counted(results: Results) -> list[TaskSummary]:
    """The tasks that enter the mean."""
    return [t for t in results.tasks if t.in_mean]


def line_of(results: Results, variant_id: str) -> VariantSummary | None:
    """The closing table's line of a variant."""
    return next((v for v in results.variants if v.variant.id == variant_id), None)


def at_n(tasks: Sequence[TaskSummary]) -> str:
    """`n = 200`, or each task's own n where they differ."""
    sizes = sorted({t.n for t in tasks})
    return f"n = {sizes[0]}" if len(sizes) == 1 else f"n = {sizes[0]} to {sizes[-1]}"


def cut_text(results: Results) -> str:
    """`4 of 30 blocks (10.5% of the parameters, 13.3% of the matmul FLOPs per token)`."""
    gone = len(results.plan.removed)
    return (
        f"{gone} of {results.plan.n_layers} blocks ({100 * results.param_cut:.2f}% of the parameters, "
        f"{100 * results.matmul_flop_cut:.2f}% of the matmul FLOPs per token)"
    )


def recovery_text(results: Results, line: VariantSummary) -> str:
    """`93.4% of the original's mean score (63.4 against 67.9 over 2 tasks, n = 200; 88.0% chance-corrected)`."""
    tasks, original = counted(results), line_of(results, "original")
    if line.mean is None or original is None or original.mean is None:
        return "an unknown share of the original's score, since no task qualifies for the mean"
    return (
        f"{recovered(line.recovery)} of the original's mean score ({100 * line.mean:.1f} against "
        f"{100 * original.mean:.1f} over {plural(len(tasks), 'task')}, {at_n(tasks)}; "
        f"{recovered(line.chance_corrected)} chance-corrected)"
    )


def headline(results: Results) -> str:
    """The answer in one sentence, and what the intervals allow to be said about it. Plain text."""
    removed = f"Removing {cut_text(results)}"
    if not counted(results):
        said = f"{removed} cannot be judged by recovery: the original clears chance on no task, so that none counts."
        return " ".join([said, *verdicts(results)])
    pruned = line_of(results, "pruned")
    said = f"{removed} leaves {recovered(pruned.recovery)} of the original's mean score" if pruned else removed
    arms = [v for v in results.variants if v.variant.arm not in ("original", "pruned")]
    brought = [
        f"{v.variant.id} {recovered(v.recovery)} ({recovered(v.chance_corrected)} chance-corrected)" for v in arms
    ]
    if brought:
        said += f"; after training, {' and '.join(brought)}" if pruned else f": {' and '.join(brought)}"
    return " ".join([f"{said}.", *verdicts(results)])


def verdicts(results: Results) -> list[str]:
    """Sentences that compare the arms of each data set with each other and with the pruned model.

    "Better" and "worse" stand only where the 95% interval of the difference leaves zero out.
    """
    ids = {v.variant.id for v in results.variants}
    said = []
    for line in results.variants:
        variant = line.variant
        if variant.arm in ("original", "pruned", "sft"):
            continue
        sft = dataclasses.replace(variant, arm="sft").id
        said += [_verdict(results, variant.id, other) for other in (sft, "pruned") if other in ids]
    return said


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


def _verdict(results: Results, one: str, other: str) -> str:
    a, b = line_of(results, one), line_of(results, other)
    mean_a, mean_b = (mean_of(a) if a else None), (mean_of(b) if b else None)
    if mean_a and mean_b:
        return f"In the mean, {_compared(one, other, mean_a, mean_b, True, counted(results))}."
    parts = [
        f"on {label(results, t)}, {_compared(one, other, t.scores[one], t.scores[other], t.higher_is_better, [t])}"
        for t in results.tasks
    ]
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}."


def _compared(
    one: str, other: str, a: TaskScore, b: TaskScore, higher_is_better: bool, tasks: Sequence[TaskSummary]
) -> str:
    word = compare(a, b, higher_is_better)
    if not word:
        return f"{one} and {other} are not told apart at {at_n(tasks)}"
    gap = abs(a.value - b.value)
    by = f"{100 * gap:.1f} points" if in_percent(tasks[0]) else f"{gap:.3f}"
    return f"{one} is {word} than {other} by {by} ({at_n(tasks)})"


def losses(results: Results, variant_id: str) -> list[str]:
    """Task by task, what a variant lost against the original, as far as the intervals tell. Plain text."""
    lines = []
    for task in results.tasks:
        share = in_percent(task)
        mine, theirs = task.scores[variant_id], task.scores["original"]
        word = compare(mine, theirs, task.higher_is_better)
        verdict = f"{word} than the original" if word else f"not told apart from the original at n = {task.n}"
        unit = "%" if share else f" {task.metric}"
        scores = f"{number(mine.value, share)}{unit} against {number(theirs.value, share)}{unit}"
        lines.append(f"{label(results, task)}: {scores}, {verdict}.")
    return lines


def data_sentence(name: str, train_set: TrainSet) -> str:
    """Acceptance, tokens and change of length of a rewritten set, in plain text."""
    change = train_set.rewrite_chars / train_set.reference_chars - 1 if train_set.reference_chars else 0.0
    sampling = ", ".join(f"{k} {v}" for k, v in sorted(train_set.sampling.items()) if v is not None)
    others = "the reference answer in the others" if train_set.on_reject == "reference" else "the others left both sets"
    rate = train_set.tokens_per_second
    told = (
        f"{name}: the original's own words are used in {percent(train_set.kept_fraction)} of "
        f"{plural(train_set.rows, 'row')}, {others}. Mode {train_set.mode}, engine {train_set.engine}"
        f"{f' ({sampling})' if sampling else ''}, {train_set.n_tokens:,} tokens in {duration(train_set.seconds)}"
        f"{f' ({rate:,.1f} per second)' if rate else ''}. All rewrites, those not used included, are "
        f"{abs(100 * change):.0f}% {'longer' if change >= 0 else 'shorter'} than the references, in characters."
    )
    if train_set.rewrite_nats is not None and train_set.reference_nats is not None:
        told += (
            f" Given the prompt alone, the original's loss on all of them is {train_set.rewrite_nats:.2f} nats per "
            f"token, on the references {train_set.reference_nats:.2f}."
        )
    return told


def reasons_table(train_set: TrainSet) -> list[list[str]]:
    """Header row, then rows of the set by reason, the accepted first; the others say what came of the row."""
    fate = "the row is left out" if train_set.on_reject == "drop" else "the reference is used"
    meanings = {reason: told if reason == "kept" else f"{told}, so {fate}" for reason, told in REASONS.items()}
    order = sorted(train_set.reasons.items(), key=lambda r: (r[0] != "kept", -r[1], r[0]))
    rows = [[r, str(n), percent(n / max(1, train_set.rows)), meanings.get(r, "")] for r, n in order]
    return [["reason", "rows", "share", "meaning"], *rows]


def stages(results: Results) -> list[tuple[str, float]]:
    """Seconds per step (`scan`, `train/VARIANT`) in run order, whatever order the record was read in."""
    ids = [v.variant.id for v in results.variants]

    def place(step: tuple[str, float]) -> tuple[int, int, str]:
        stage, _, variant = step[0].partition("/")
        at = STAGES.index(stage) if stage in STAGES else len(STAGES)
        return at, ids.index(variant) if variant in ids else -1, step[0]

    return sorted(results.stage_seconds.items(), key=place)


def train_set_of(results: Results, variant: Variant) -> TrainSet | None:
    """The set an arm was trained on: by the name of its data, or the only one there is."""
    sets = results.train_sets
    found = sets.get(variant.data or "") or sets.get(variant.id)
    return found or (next(iter(sets.values())) if len(sets) == 1 else None)
