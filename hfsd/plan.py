"""Plan: what a recipe will cost before it is run: sizes, memory, disk and time. No weights are read or fetched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import cost, disk, fetch, memory, models, probe, surgery, workload
from hfsd.cost import Shape
from hfsd.disk import Need
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.memory import Memory
from hfsd.recipe import Recipe
from hfsd.settings import Job, check_fields
from hfsd.steps import steps, variants
from hfsd.text import count, duration, size
from hfsd.workload import Work

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TRAINING = 3.0  # a backward pass takes twice the FLOPs of the forward pass


@dataclass(frozen=True)
class StepTime:
    """Wall time of a step: `seconds` None where it is not known, and `note` says why. `at_most`: it may end earlier."""

    step: str
    tokens: int | None
    seconds: float | None
    at_most: bool = False
    note: str = ""


@dataclass(frozen=True)
class Plan:
    """What a recipe will cost.

    `pruned` holds one shape, or two where a scan chooses among unlike blocks: the least and the most of each figure;
    the cuts, as shares, stand in the same order. `disk_needed` is the most at a time, of `disk_free` bytes at
    `disk_at`; `fetched` are the bytes of the original that are not here yet. `rate` says what times rest on.
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
    fetched: int
    times: list[StepTime]
    lengths: workload.Lengths
    rate: str
    notes: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Of all steps whose time is known."""
        return sum(t.seconds or 0.0 for t in self.times)


def make(recipe: Recipe, tokens_per_second: float | None = None, probe: bool = True, root: Path | None = None) -> Plan:
    """Plans a recipe; of a model on the Hub only config and tokenizer are fetched.

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
    jobs = [_job(recipe, arm, rows.longest, cuts) for arm in recipe.train.arms if arm not in recipe.train.adapter_from]
    biggest = min(cuts, key=lambda gone: sum(blocks[i].params for i in gone))
    cut = cost.cut(config, [i for i in range(len(blocks)) if i not in biggest])
    trained = [memory.of_arm(job, cut, config) for job in jobs]
    names = [step.stage.name for step in steps(recipe, root)]
    adapter = 4 * max((m.trained_params for m in trained), default=0)
    sizes = disk.sizes(recipe)
    written = disk.needs(recipe, sizes, names, root, adapter)
    place = disk.standing(root)
    work = workload.of_steps(recipe, names, variants(recipe), rows, len(blocks))
    times, rate = _times(recipe, config, jobs, rows, work, [original, pruned[-1]], cuts, tokens_per_second, probe)
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
        disk=[n for n in written if n.stays or n.passes or n.stays is None],
        disk_needed=disk.most(written),
        disk_free=disk.free(place),
        disk_at=str(place),
        fetched=0 if sizes is None or sizes.fetched else sizes.bytes,
        times=times,
        lengths=rows,
        rate=rate,
        notes=[n for n in (original.kv_note, *(m.note for m in trained), *map(_too_much, trained)) if n],
    )


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
    recipe: Recipe,
    config: PreTrainedConfig,
    jobs: Sequence[Job],
    rows: workload.Lengths,
    work: Sequence[Work],
    shapes: Sequence[Shape],
    cuts: Sequence[tuple[int, ...]],
    stated: float | None,
    measure: bool,
) -> tuple[list[StepTime], str]:
    """Seconds of every step that has work, and what they rest on."""
    if stated is not None:
        share = {"original": 1.0, "pruned": shapes[1].matmul_flops / shapes[0].matmul_flops}
        told = f"stated: {stated:g} tokens/s of the original, training {TRAINING:g} x as long, a cut model by its FLOPs"
        return _summed(work, lambda w: share[w.model] * _tokens(w, TRAINING) / stated), told
    if not measure:
        return _summed(work, None), "no times: neither a probe nor --tokens-per-second"
    if not jobs:
        jobs = [_job(recipe, recipe.train.arms[0], rows.longest, cuts)]
    try:
        rates = probe.run(config, jobs[0], *workload.decoded_at_once(recipe, rows))
    except HfsdError as error:
        return _summed(work, None), f"no times: {error}"
    depth = {"original": config.get_text_config(decoder=True).num_hidden_layers}
    depth["pruned"] = depth["original"] - len(cuts[0])

    def seconds(w: Work) -> float:
        n = depth[w.model]
        turns = max(1.0, w.rows / rates.rows)
        return w.forward * rates.forward.at(n) + w.trained * rates.train.at(n) + w.passes * turns * rates.decode.at(n)

    return _summed(work, seconds), rates.measured


def _tokens(work: Work, training: float = 1.0) -> float:
    return work.forward + training * work.trained + work.passes * work.rows


def _summed(work: Sequence[Work], seconds: Callable[[Work], float] | None) -> list[StepTime]:
    """The works of each step together, in the order of the steps."""
    found = []
    for name in dict.fromkeys(w.step for w in work):
        mine = [w for w in work if w.step == name]
        unknown = next((w.unknown for w in mine if w.unknown), "")
        tokens = None if unknown else round(sum(map(_tokens, mine)))
        took = sum(map(seconds, mine)) if seconds and not unknown else None
        found.append(StepTime(name, tokens, took, any(w.bound for w in mine), unknown))
    return found


def text(plan: Plan) -> str:
    """The plan as plain tables, for a terminal."""
    cuts = " to ".join(dict.fromkeys(_percent(c) for c in plan.param_cut))
    flops = " to ".join(dict.fromkeys(_percent(c) for c in plan.matmul_flop_cut))
    params = " to ".join(dict.fromkeys(count(p.params) for p in plan.pruned))
    parts = [
        f"{plan.name}: {plan.model}, {plan.removed} of {plan.n_layers} blocks removed",
        f"{count(plan.original.params)} -> {params} parameters: cut by {cuts}; matmul FLOPs per token by {flops}",
        _table(_shape_rows(plan)),
    ]
    if plan.memory:
        parts += ["training memory of one process, at its peak", _table(_memory_rows(plan))]
    parts += [f"disk ({plan.disk_at} has {size(plan.disk_free)} free)", _table(_disk_rows(plan))]
    parts += [f"time ({plan.rate})", _table(_time_rows(plan)), f"lengths: {plan.lengths.source}"]
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
    if plan.fetched:
        rows.append(["(fetch)", size(plan.fetched), "-", "the original, into the Hub's cache"])
    for need in plan.disk:
        stays, passes = ("n/a" if n is None else size(n) for n in (need.stays, need.passes))
        rows.append([need.step, stays, passes, need.what])
    return [*rows, ["in all, at its most", size(plan.disk_needed), "", "in the run directory"]]


def _time_rows(plan: Plan) -> list[list[str]]:
    rows = [["step", "tokens", "time"]]
    for t in plan.times:
        told = t.note or ("n/a" if t.seconds is None else f"{'at most ' if t.at_most else ''}{duration(t.seconds)}")
        rows.append([t.step, "n/a" if t.tokens is None else f"{t.tokens:,}", told])
    if all(t.seconds is None for t in plan.times):
        return rows
    left_out = "" if all(t.seconds is not None for t in plan.times) else ", of what is known"
    return [*rows, [f"in all{left_out}", "", duration(plan.seconds)]]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _percent(share: float) -> str:
    """A share as `16.30%`."""
    return f"{100 * share:.2f}%"
