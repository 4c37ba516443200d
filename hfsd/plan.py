"""Plan: what a recipe will cost before it is run: sizes, memory, disk and time, from the model's config.

No weights are read, and of a model on the Hub none are fetched. A GGUF file, or one in a package, has its config in
itself: it is fetched and dequantised into the cache once, as a run would do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import cost, disk, fetch, memory, models, surgery, workload
from hfsd import probe as probing
from hfsd.cost import Shape
from hfsd.disk import Need
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.memory import Memory
from hfsd.probe import Rates
from hfsd.recipe import Recipe
from hfsd.settings import Job, check_fields
from hfsd.steps import steps, variants
from hfsd.units import aligned, count, duration, size
from hfsd.workload import Work

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LEFT_OUT = "left out: processes that start, models and data that load, pictures; up to: answers at their longest"
TRAINING = 3.0  # a backward pass takes twice the FLOPs of the forward pass


@dataclass(frozen=True)
class StepTime:
    """About how long a step computes: `seconds` None where it is not known, and `note` says why.

    What does not grow with the work (processes that start, models and data that load) is left out. `up_to`: answers are
    counted as long as they may be, and may end earlier. `partly`: `seconds` and `tokens` are of a part of the step, and
    `note` says what is not known of the rest.
    """

    step: str
    tokens: int | None
    seconds: float | None
    up_to: bool = False
    note: str = ""
    partly: bool = False


@dataclass(frozen=True)
class Plan:
    """What a recipe will cost.

    `pruned` holds one shape, or two where a scan chooses among unlike blocks: the least and the most of each figure;
    the cuts, as shares, stand in the same order. `disk_needed` is the most at a time, of `disk_free` bytes at
    `disk_at`, the original's among them where it is still to be fetched into the same file system. `lengths` are those
    of each data set; `rate` says what times rest on.
    """

    name: str
    model: str
    n_layers: int
    removed: int
    original: Shape
    pruned: list[Shape]
    param_cut: list[float]
    matmul_flop_cut: list[float]
    memory: list[Memory]
    disk: list[Need]
    disk_needed: int
    disk_free: int
    disk_at: str
    times: list[StepTime]
    lengths: list[workload.Lengths]
    rate: str
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all steps whose time is known."""
        return sum(t.seconds or 0.0 for t in self.times)


def make(recipe: Recipe, tokens_per_second: float | None = None, probe: bool = True, root: Path | None = None) -> Plan:
    """Plans a recipe. Of a model on the Hub only config and tokenizer are fetched; a GGUF file is dequantised once.

    Args:
        tokens_per_second: of the original on the machine that will run it, taken instead of the probe for forward
            passes and decoding; a training step takes three times as long per token.
        probe: measure this device for half a minute. Without it and without a stated rate there are no times.
        root: the run directory; None: runs/NAME.

    Raises:
        BadRequest: the recipe does not fit the model, or there is no such model or data.
    """
    if faults := check_fields(recipe.train):
        raise BadRequest("\n".join(faults))
    if tokens_per_second is not None and tokens_per_second <= 0:
        raise BadRequest(f"--tokens-per-second is {tokens_per_second:g}; it is a positive number")
    root = root or Path("runs") / recipe.name
    remote = recipe.model.trust_remote_code
    folder = fetch.config_folder(recipe.model)
    config = models.load_config(folder, remote)
    original, blocks = cost.by_block(config, remote)
    if recipe.prune.blocks is not None and recipe.prune.blocks >= len(blocks):
        raise BadRequest(f"prune.blocks: {recipe.prune.blocks} of the {len(blocks)} blocks of {recipe.model.path}")
    cuts = _cuts(recipe, config, blocks)
    pruned = _bounds([original.less(blocks[i] for i in gone) for gone in cuts])
    rows = workload.lengths(recipe)
    longest = max(one.longest for one in rows)
    jobs = [_job(recipe, arm, longest, cuts) for arm in recipe.train.arms if arm not in recipe.train.adapter_from]
    biggest = min(cuts, key=lambda gone: sum(blocks[i].params for i in gone))
    cut = cost.cut(config, [i for i in range(len(blocks)) if i not in biggest])
    trained = [memory.of_arm(job, cut, config) for job in jobs]
    names = [step.stage.name for step in steps(recipe, root)]
    adapter = 4 * max((m.trained_params for m in trained), default=0)
    sizes = disk.sizes(recipe)
    written, fetched = disk.needs(recipe, sizes, names, root, adapter), disk.fetching(sizes)
    place = disk.standing(root)
    beside = fetched if sizes is not None and disk.same_disk(sizes.folder, root) else []
    work = workload.of_steps(recipe, names, variants(recipe), rows, len(blocks))
    job = jobs[0] if jobs else _job(recipe, recipe.train.arms[0], longest, cuts)
    checkpointed = bool(trained) and trained[0].checkpointing
    measure = partial(probing.run, config, job, *workload.decoded_at_once(recipe, rows), checkpointed)
    depths = {"original": len(blocks), "pruned": len(blocks) - len(cuts[0])}
    share = {"original": 1.0, "pruned": pruned[-1].matmul_flops / original.matmul_flops}
    times, rate = _times(work, depths, share, tokens_per_second, measure if probe else None)
    return Plan(
        name=recipe.name,
        model=recipe.model.path,
        n_layers=len(blocks),
        removed=len(cuts[0]),
        original=original,
        pruned=pruned,
        param_cut=[1 - p.params / original.params for p in pruned],
        matmul_flop_cut=[1 - p.matmul_flops / original.matmul_flops for p in pruned],
        memory=trained,
        disk=[*fetched, *(n for n in written if n.stays or n.passes or n.stays is None)],
        disk_needed=disk.most([*beside, *written]),
        disk_free=disk.free(place),
        disk_at=str(place),
        times=times,
        lengths=rows,
        rate=rate,
        notes=[n for n in (_read(recipe), original.kv_note, *(m.note for m in trained), *map(_too_much, trained)) if n],
    )


def _read(recipe: Recipe) -> str:
    if not fetch.is_gguf(recipe.model):
        return ""
    return "a GGUF file is read for its config: fetched, and dequantised into the cache, once"


def _too_much(of: Memory) -> str:
    if of.total is None or of.total <= of.free:
        return ""
    return (
        f"{of.arm} does not fit here: {size(of.total)} of {size(of.free)} that is free; lower "
        "train.sft.per_device_train_batch_size, or train elsewhere"
    )


def _cuts(recipe: Recipe, config: PreTrainedConfig, blocks: Sequence[Shape]) -> list[tuple[int, ...]]:
    """The blocks that may be removed: the one cut that is given, or those that a scan may choose, one of each kind.

    Raises:
        Refusal: no cut of that many blocks is sound.
    """
    depth, asked = len(blocks), recipe.prune
    if asked.from_ is not None:
        made = models.provenance(Path(asked.from_))
        if made is None:
            raise BadRequest(f"prune.from: {asked.from_} has no {models.PROVENANCE}; cut it with `hfsd prune`")
        return [tuple(i for i in range(depth) if i not in made.kept)]
    if not asked.blocks:
        return [tuple(surgery.plan_by_hand(depth, asked).removed)]
    ranges = [tuple(range(at, at + asked.blocks)) for at in range(depth - asked.blocks + 1)]
    if recipe.scan.search == "greedy":  # any blocks: the dearest and the cheapest of them
        order = sorted(range(depth), key=lambda i: blocks[i].params)
        ranges += [tuple(sorted(order[: asked.blocks])), tuple(sorted(order[-asked.blocks :]))]
    found: dict[Shape, tuple[int, ...]] = {}
    refusal: Refusal | None = None
    described = config.to_dict()
    nothing = replace(blocks[0], params=0, matmul_flops=0, kv_bytes=0, checkpoint_bytes=0, state_bytes=0)
    for gone in ranges:
        try:
            surgery.refuse_unsound(described, [i for i in range(depth) if i not in gone], depth)
        except Refusal as error:
            refusal = error
            continue
        found.setdefault(nothing.less(blocks[i] for i in gone), gone)
    if not found and refusal is not None:
        raise refusal
    return list(found.values())


def _bounds(shapes: Sequence[Shape]) -> list[Shape]:
    """The shape, or the least and the most of each figure over several."""
    if len(set(shapes)) == 1:
        return [shapes[0]]
    bounds = []
    for pick in (min, max):
        made: dict[str, Any] = {}
        for name in (f.name for f in fields(Shape) if f.name not in ("dtype", "kv_note")):
            values = [getattr(s, name) for s in shapes]
            made[name] = None if None in values else pick(values)
        bounds.append(replace(shapes[0], **made))
    return bounds


def _job(recipe: Recipe, arm: str, longest: int, cuts: Sequence[tuple[int, ...]]) -> Job:
    """An arm as it would be trained; where a scan chooses the cut, as if all blocks lay behind it."""
    first = min((gone[0] for gone in cuts if gone), default=0)
    model = recipe.model
    return Job(
        arm, recipe.train.seeds[0], recipe.train, first, Path("."), model.dtype, model.trust_remote_code, longest
    )


def _times(
    work: Sequence[Work],
    depths: Mapping[str, int],
    share: Mapping[str, float],
    stated: float | None,
    measure: Callable[[], Rates] | None,
) -> tuple[list[StepTime], str]:
    """Seconds of every step that has work, and what they rest on.

    Args:
        depths: blocks of the original and of the pruned model.
        share: their FLOPs per token over the original's.
        stated: tokens per second of the original, instead of what is measured.
        measure: the probe; None: it is not wanted.
    """
    if stated is not None:
        told = f"stated: {stated:g} tokens/s of the original, training {TRAINING:g} x as long, a cut model by its FLOPs"
        return _summed(work, lambda w: share[w.model] * _tokens(w, TRAINING) / stated), told
    if measure is None:
        return _summed(work, None), "no times: neither a probe nor --tokens-per-second"
    try:
        rates = measure()
    except HfsdError as error:
        return _summed(work, None), f"no times: {error}"

    def seconds(w: Work) -> float:
        n = depths[w.model]
        return w.forward * rates.forward.at(n) + w.trained * rates.train.at(n) + w.passes * rates.decoding(w.rows, n)

    return _summed(work, seconds), rates.measured


def _tokens(work: Work, training: float = 1.0) -> float:
    return work.forward + training * work.trained + work.passes * work.rows


def _summed(work: Sequence[Work], seconds: Callable[[Work], float] | None) -> list[StepTime]:
    """The works of each step together, in the order of the steps."""
    found = []
    for name in dict.fromkeys(w.step for w in work):
        mine = [w for w in work if w.step == name]
        known, unknown = [w for w in mine if not w.unknown], dict.fromkeys(w.unknown for w in mine if w.unknown)
        tokens = round(sum(map(_tokens, known))) if known else None
        took = sum(map(seconds, known)) if seconds and known else None
        bound = any(w.bound for w in known)
        found.append(StepTime(name, tokens, took, bound, "; ".join(unknown), bool(known and unknown)))
    return found


def text(plan: Plan) -> str:
    """The plan as plain tables, for a terminal."""
    cuts = " to ".join(dict.fromkeys(_percent(c) for c in plan.param_cut))
    flops = " to ".join(dict.fromkeys(_percent(c) for c in plan.matmul_flop_cut))
    params = " to ".join(dict.fromkeys(count(p.params) for p in plan.pruned))
    parts = [
        f"{plan.name}: {plan.model}, {plan.removed} of {plan.n_layers} blocks removed",
        f"{count(plan.original.params)} -> {params} parameters: cut by {cuts}; matmul FLOPs per token by {flops}",
        "\n".join(aligned(_shape_rows(plan))),
    ]
    if plan.memory:
        parts += ["training memory of one process, at its peak", "\n".join(aligned(_memory_rows(plan)))]
    parts += [f"disk ({plan.disk_at} has {size(plan.disk_free)} free)", "\n".join(aligned(_disk_rows(plan)))]
    parts += [f"time ({plan.rate})", "\n".join(aligned(_time_rows(plan)))]
    if any(t.seconds is not None for t in plan.times):
        parts += [LEFT_OUT]
    parts += [f"lengths of {one.data}: {one.source}" for one in plan.lengths]
    return "\n\n".join([*parts, *(f"note: {note}" for note in plan.notes)])


def _shape_rows(plan: Plan) -> list[list[str]]:
    names = ["pruned"] if len(plan.pruned) == 1 else ["pruned, at least", "pruned, at most"]
    rows = [["", "parameters", "matmul FLOPs/token", "cache/token", "fixed state", "checkpoint"]]
    for name, shape in zip(["original", *names], [plan.original, *plan.pruned], strict=True):
        kv, state = ("n/a" if n is None else size(n) for n in (shape.kv_bytes, shape.state_bytes))
        flops = f"{shape.matmul_flops / 1e9:.3f} G"
        rows.append([name, count(shape.params), flops, kv, state, f"{size(shape.checkpoint_bytes)} ({shape.dtype})"])
    return rows


def _memory_rows(plan: Plan) -> list[list[str]]:
    heads = [
        "arm",
        "batch",
        "weights",
        "gradients",
        "optimizer",
        "teacher",
        "activations",
        "libraries",
        "total",
        "free",
    ]
    rows = [heads]
    for m in plan.memory:
        batch = f"{m.rows} x {m.tokens} tokens{', checkpointed' if m.checkpointing else ''}"
        named = f"{m.arm} ({m.method}, {m.dtype}, {count(m.trained_params)} trained)"
        held = (m.weights, m.gradients, m.optimizer, m.teacher, m.activations, m.libraries, m.total, m.free)
        rows.append([named, batch, *("n/a" if n is None else size(n) for n in held)])
    return rows


def _disk_rows(plan: Plan) -> list[list[str]]:
    rows = [["step", "stays", "on the way", "what"]]
    for need in plan.disk:
        stays, passes = ("n/a" if n is None else size(n) for n in (need.stays, need.passes))
        rows.append([need.step, stays, passes, need.what])
    return [*rows, ["in all, at its most", size(plan.disk_needed), "", "in the run directory"]]


def _time_rows(plan: Plan) -> list[list[str]]:
    rows = [["step", "tokens", "time, about"]]
    for t in plan.times:
        told = [] if t.seconds is None else [f"{'up to ' if t.up_to else ''}{duration(t.seconds)}"]
        told += ["and more: " * t.partly + t.note] if t.note else []
        rows.append([t.step, "n/a" if t.tokens is None else f"{t.tokens:,}", ", ".join(told) or "n/a"])
    if all(t.seconds is None for t in plan.times):
        return rows
    whole = all(t.seconds is not None and not t.partly for t in plan.times)
    return [*rows, [f"in all{'' if whole else ', of what is known'}", "", duration(plan.seconds)]]


def _percent(share: float) -> str:
    """A share as `16.30%`."""
    return f"{100 * share:.2f}%"
