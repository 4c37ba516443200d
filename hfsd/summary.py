"""Scores of all variants as the closing table shows them: which tasks count, means and recoveries with intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy

from hfsd.documents import Array, Key
from hfsd.errors import HfsdError
from hfsd.findings import Estimate, EvalRow, Setup, Shift, TaskScore, TaskSummary, VariantSummary
from hfsd.paired import Draws, around, estimate, ratios
from hfsd.records import TrainReport, Variant
from hfsd.stats import EPSILON, average, by_arm, interval, key_of, recovery

MARGIN = 0.10  # by how much the original must beat chance for a task to say anything about recovery
# Metrics of one task that say the same thing twice; the leaderboard takes the first of these, else the first given.
PREFERRED = ("acc_norm",)

# Of a task's setup, what no variant may have of its own. Another tokenizer may bring another chat template, or none:
# that is said under the table (`TaskSummary.remarks`).
ASKED = ("limit", "seed", "fewshot", "engine", "data", "comparable")
MEANS = ("mean", "recovery", "mean_of_ratios", "chance_corrected")


def summarise_tasks(rows: Sequence[EvalRow], draws: Draws) -> list[TaskSummary]:
    """One summary per (task, metric, filter), in the order in which the original's rows come.

    Args:
        rows: scores of all variants.
        draws: of `paired.resample`; recoveries of a task without draws have no interval.

    Raises:
        HfsdError: no rows, no original, a variant without a task, or variants that answered different documents.
    """
    table: dict[Key, dict[str, EvalRow]] = {}
    for row in rows:
        _sound(row)
        table.setdefault((row.task, row.metric, row.filter), {})[row.variant.id] = row
    ids = [v.id for v in sorted({row.variant for row in rows}, key=by_arm)]
    if "original" not in ids:
        raise HfsdError(
            f"no scores of the original among {ids or 'no variants'}; evaluate it first: nothing to recover to"
        )
    for key, scored in table.items():
        _same_documents(key, ids, scored)
    counted = _one_metric_per_task({key: scored["original"] for key, scored in table.items()})
    return [_summary(key, ids, scored, key in counted, draws.get(key, {})) for key, scored in table.items()]


def summarise_variants(
    tasks: Sequence[TaskSummary],
    variants: Sequence[Variant],
    params: Mapping[str, int],
    shifts: Sequence[Shift],
    training: Sequence[TrainReport],
    draws: Draws,
) -> list[VariantSummary]:
    """One line per variant: mean over the tasks that count, recoveries, shift, training time.

    Raises:
        HfsdError: the parameter count of a variant is missing.
    """
    if missing := [v.id for v in variants if v.id not in params]:
        raise HfsdError(
            f"no parameter count for {', '.join(missing)}; counts are given for {', '.join(sorted(params))}"
        )
    shift_of = {s.variant.id: s for s in shifts}
    seconds = {t.variant.id: t.seconds for t in training}
    counted = [t for t in tasks if t.in_mean]
    return [
        VariantSummary(
            variant=variant,
            params=int(params[variant.id]),
            **over_tasks(counted, variant.id, draws),
            shift=shift_of.get(variant.id),
            train_seconds=seconds.get(variant.id),
        )
        for variant in sorted(variants, key=by_arm)
    ]


def over_tasks(counted: Sequence[TaskSummary], variant_id: str, draws: Draws) -> dict[str, Estimate | None]:
    """A variant's mean and its recoveries over the tasks that count, by their names in `VariantSummary`.

    The mean's interval is made of the tasks' own (Zou and Donner 2008, Stat Med 27:1693, over K tasks: the squared
    distances to the bounds add up, with the tasks' correlation over shared documents), so that one task's mean is that
    task. The recoveries' are of the paired bootstrap.
    """
    if not counted:
        return dict.fromkeys(MEANS)
    scores, originals = ([t.scores[v] for t in counted] for v in (variant_id, "original"))
    value, original = (average([s.value for s in side]) for side in (scores, originals))
    chance = average([t.chance or 0.0 for t in counted])
    shares = [s.recovery.value for s in scores if s.recovery is not None]
    mean_share = average(shares) if len(shares) == len(scores) else None
    points = (recovery(value, original), mean_share, recovery(value, original, chance))
    mine, theirs = (_drawn(counted, v, draws) for v in (variant_id, "original"))
    drawn: Sequence[Array | None] = (None, None, None)
    if mine is not None and theirs is not None:
        means = mine.mean(axis=0), theirs.mean(axis=0)
        drawn = ratios(*means), ratios(mine, theirs).mean(axis=0), ratios(*means, chance)
    estimates = [_mean_interval(value, scores, mine), *map(estimate, points, drawn)]
    return dict(zip(MEANS, estimates, strict=True))


def _drawn(counted: Sequence[TaskSummary], variant_id: str, draws: Draws) -> Array | None:
    """A variant's scores per task and draw, (tasks, draws); None unless all of the tasks have draws."""
    if not all(key_of(t) in draws for t in counted):
        return None
    return numpy.stack([draws[key_of(t)][variant_id] for t in counted])


def _mean_interval(value: float, scores: Sequence[TaskScore], drawn: Array | None) -> Estimate:
    down = numpy.array([s.value - s.low if s.low is not None else 0.0 for s in scores])
    up = numpy.array([s.high - s.value if s.high is not None else 0.0 for s in scores])
    k = len(scores)
    together = numpy.ones((k, k))  # without documents: as if all moved together, which is the widest
    if drawn is not None:
        spread = drawn.std(axis=1)
        gaps = (drawn - drawn.mean(axis=1, keepdims=True)) / numpy.where(spread > 0, spread, 1.0)[:, None]
        together = gaps @ gaps.T / drawn.shape[1]
        numpy.fill_diagonal(together, 1.0)
    below, above = (math.sqrt(max(0.0, float(side @ together @ side))) / k for side in (down, up))
    return around(value, value - below, value + above)


def _sound(row: EvalRow) -> None:
    what = f"{row.task} of {row.variant.id}"
    if row.n < 1:
        raise HfsdError(f"{what} was scored on {row.n} documents; evaluate at least one")
    if not math.isfinite(row.value) or (row.stderr is not None and not math.isfinite(row.stderr)):
        raise HfsdError(f"{what} is {row.value} +- {row.stderr}: no number; evaluate it again")


def _same_documents(key: Key, ids: Sequence[str], scored: Mapping[str, EvalRow]) -> None:
    name = key[0]
    if missing := [i for i in ids if i not in scored]:
        raise HfsdError(f"{name} ({key[1]}) has no score of {', '.join(missing)}; evaluate every variant on every task")
    for field in ("n", "shots", "version", "chance", "higher_is_better", *ASKED):
        seen = {i: getattr(scored[i].setup if field in ASKED else scored[i], field) for i in ids}
        if len(set(seen.values())) > 1:
            values = ", ".join(f"{i} {v}" for i, v in seen.items())
            raise HfsdError(f"{name}: variants differ in {field} ({values}), so their scores cannot be compared")


def _one_metric_per_task(originals: Mapping[Key, EvalRow]) -> set[Key]:
    """A task that reports several metrics or filters enters a mean once: by the first that the original clears.

    A strict filter that the original seldom passes does not take its task out of the mean where a flexible one says
    something. Since the original alone is judged, the choice is the same for all variants.
    """
    chosen: dict[str, Key] = {}
    for key in sorted(originals, key=lambda key: key[1] not in PREFERRED):  # which keeps the order otherwise
        if not _why_out(originals[key]):
            chosen.setdefault(key[0], key)
    return set(chosen.values())


def _summary(
    key: Key, ids: Sequence[str], scored: Mapping[str, EvalRow], counts: bool, draws: Mapping[str, Array]
) -> TaskSummary:
    original = scored["original"]
    note = _why_out(original) or ("" if counts else "another metric or filter of this task is counted")
    return TaskSummary(
        task=key[0],
        metric=key[1],
        n=original.n,
        chance=original.chance,
        shots=original.shots,
        higher_is_better=original.higher_is_better,
        in_mean=not note,
        note=note,
        scores={i: _score(scored[i], original, draws) for i in ids},
        filter=key[2],
        version=original.version,
        setup=original.setup,
        remarks=tuple(_remarks(ids, scored)),
    )


def _remarks(ids: Sequence[str], scored: Mapping[str, EvalRow]) -> list[str]:
    original, said = scored["original"], []
    if not original.pooled:
        said.append("a mean of its tasks' scores whatever their sizes, with intervals of 1.96 standard errors")
    ways: dict[str, list[str]] = {}
    for i in ids:
        ways.setdefault(_chat(scored[i].setup), []).append(i)
    said += [f"{', '.join(who)} asked {way}" for way, who in ways.items() if len(ways) > 1]
    cut: dict[int, list[str]] = {}
    for i in ids:
        cut.setdefault(scored[i].setup.truncated, []).append(i)
    for count, who in cut.items():
        if count:
            of = f" of {', '.join(who)}" if len(cut) > 1 else ""
            said.append(
                f"{count} of {original.n} documents{of} were longer than the model reads and lost their beginning"
            )
    return said


def _chat(setup: Setup) -> str:
    if not setup.chat_template:
        return "without a chat template"
    return f"in the chat template, {'each shot a turn' if setup.multiturn else 'all shots in one turn'}"


def _score(row: EvalRow, original: EvalRow, draws: Mapping[str, Array]) -> TaskScore:
    low, high = interval(row)

    def recovered(chance: float | None) -> Estimate | None:
        if not row.higher_is_better or chance is None:
            return None
        drawn = ratios(draws[row.variant.id], draws["original"], chance) if draws else None
        return estimate(recovery(row.value, original.value, chance), drawn)

    return TaskScore(float(row.value), low, high, recovered(0.0), recovered(row.chance))


def _why_out(original: EvalRow) -> str:
    """Why a task says nothing about recovery, or "" where it does; judged on the original alone."""
    if not original.higher_is_better:
        return "lower is better"
    if original.chance is None:
        return "its chance level is not known"
    low, _ = interval(original)
    score, chance = f"{100 * original.value:.1f}%", f"{100 * original.chance:.1f}%"
    if original.value - original.chance < MARGIN - EPSILON:
        return f"the original scores {score}, less than {100 * MARGIN:.0f} points above chance ({chance})"
    if low is None:
        return f"the original's {score} has no interval that could be clear of chance ({chance})"
    if low <= original.chance:
        return f"the original's {score} has a 95% interval that is not clear of chance ({chance}) at n = {original.n}"
    return ""
