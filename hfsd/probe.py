"""How fast this device computes a model, from its config: random weights, few blocks, and a line through the times.

What does not depend on the depth (embeddings, head, the loss) is the line's start; each block adds as much as the one
before. Half a minute at most, and nothing is loaded.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hfsd import cost, engines, models, settings
from hfsd.errors import HfsdError
from hfsd.settings import Job
from hfsd.text import size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

SECONDS = 30.0  # for all measures together
SHARE = SECONDS / 2 / 4  # of each kind of work at each depth
LEAST, MOST = 32, 512  # tokens of a pass that is measured
ROWS = 4  # and its rows
TURNS = 30  # of a kind of work at a depth, at most
DEPTHS = ((2, 6), (1, 2))  # blocks that are measured: the wider apart, the less of the noise, if they fit


@dataclass(frozen=True)
class Line:
    """Seconds of a model with n blocks: `start` + n x `block`."""

    start: float
    block: float

    def at(self, blocks: int) -> float:
        return self.start + blocks * self.block

    def over(self, n: int) -> Line:
        """The same for the n-th part of the work."""
        return Line(self.start / n, self.block / n)


@dataclass(frozen=True)
class Rates:
    """What a model with n blocks takes: seconds per token of a forward pass and of a training step (forward, backward),
    and seconds per pass that decodes one token of one row (`single`), and of each of `rows` rows (`decode`). `measured`
    tells where and how.
    """

    forward: Line
    train: Line
    single: Line
    decode: Line
    rows: int
    measured: str

    def decoding(self, rows: int, blocks: int) -> float:
        """Seconds per decoding pass of that many rows: on the line through the two that were measured."""
        one, many = self.single.at(blocks), self.decode.at(blocks)
        if self.rows == 1:
            return many * rows
        return one + max(0.0, many - one) * (rows - 1) / (self.rows - 1)


def run(config: PreTrainedConfig, job: Job, rows: int, context: int, checkpointed: bool) -> Rates:
    """Measures this device.

    Args:
        config: of the original.
        job: how it would be trained, adapter included.
        rows: how many are decoded at once.
        context: tokens that stand before a decoded one; no more than the model's positions leave room for.
        checkpointed: with gradient checkpointing.

    Raises:
        HfsdError: a model of two blocks does not fit in the free memory, or its class does not run.
    """
    start = time.perf_counter()
    whole, blocks = cost.by_block(config, job.trust_remote_code)
    least = whole.less(blocks[2:]).params if len(blocks) > 2 else whole.params
    depths = _depths(whole.params - least, len(blocks))
    needed = 4 * (whole.less(blocks[depths[1] :]).params if len(blocks) > depths[1] else whole.params)
    free = models.free_memory()
    if 2 * needed > free:
        raise HfsdError(
            f"the probe needs {size(2 * needed)} for a model of {depths[1]} blocks, and {size(free)} of memory is "
            "free; give --tokens-per-second, or plan on the machine that will run it"
        )
    room = (engines.positions(config) or 1 << 62) - TURNS - 2  # a turn adds a token
    context = max(1, min(context, room))
    try:
        few, more = (_built(cost.cut(config, range(n)), job) for n in depths)
        tokens = _fitting(few)
        at_once = min(rows, tokens)
        forward, single, decode, train = (
            _line(depths, *_in_turns([make(model) for model in (few, more)]))
            for make in (
                lambda model: _forward(model, tokens),
                lambda model: _decode(model, 1, context),
                lambda model: _decode(model, at_once, context),
                lambda model: _step(model, job, tokens, checkpointed),  # last: it puts an adapter on the model
            )
        )
    except Exception as error:  # whatever a class says that cannot be run so; the plan tells it
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise HfsdError(f"{config.model_type} cannot be probed ({why}); give --tokens-per-second") from error
    spent = time.perf_counter() - start
    told = (
        f"measured here ({models.device()}) on models of {depths[0]} and {depths[1]} blocks in {spent:.0f} s: passes "
        f"of {tokens} tokens, decoding of 1 and of {at_once} rows behind {context} tokens"
    )
    return Rates(forward.over(tokens), train.over(tokens), single, decode, at_once, told)


def _depths(rest: int, n_blocks: int) -> tuple[int, int]:
    """Two depths for the line; large blocks are measured at the smaller ones."""
    each = rest / max(1, n_blocks - 2)
    few, more = DEPTHS[0] if n_blocks >= DEPTHS[0][1] and each < 2e7 else DEPTHS[1]
    return few, min(more, n_blocks)


def _line(depths: tuple[int, int], few: float, more: float) -> Line:
    """Through two times; where noise hides what blocks cost, all of it is put down to them, which errs high."""
    block = (more - few) / (depths[1] - depths[0])
    start = few - depths[0] * block
    return Line(start, block) if block > 0 and start > 0 else Line(0.0, more / depths[1])


def _built(config: PreTrainedConfig, job: Job) -> Any:
    """A model with random weights, on the device and in the type of a run."""
    import torch
    from transformers import AutoModelForCausalLM

    gc.collect()  # PEFT's modules refer to one another: those of an earlier probe are let go only here
    dtype = getattr(torch, models.loaded_dtype(job.dtype))
    with models.quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=job.trust_remote_code)
    return model.to(models.device()).eval()


def _fitting(model: Any) -> int:
    """Tokens of a pass, so that a few training steps on them fit into their share."""
    took, _ = _in_turns([_forward(model, LEAST)] * 2, SHARE / 5)
    return min(max(int(LEAST * SHARE / 10 / took), LEAST), MOST)


def _ids(model: Any, rows: int, tokens: int) -> torch.Tensor:
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(0, vocabulary, (rows, tokens), device=model.device)  # [B, T]


def _forward(model: Any, tokens: int) -> Callable[[], object]:
    import torch

    text = _ids(model, ROWS, tokens // ROWS)

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=text, use_cache=False)

    return run


def _decode(model: Any, rows: int, context: int) -> Callable[[], object]:
    """One more token for each row, as generation computes it: from the cache, head included.

    The cache is that of one token, as often as the context is long: what a step costs does not depend on what it holds.
    """
    import torch

    text = _ids(model, rows, 1)
    with torch.inference_mode():
        cache = model(input_ids=text, use_cache=True).past_key_values
        for layer in cache.layers:
            if isinstance(getattr(layer, "keys", None), torch.Tensor) and not hasattr(layer, "sliding_window"):
                layer.keys, layer.values = (t.repeat_interleave(context, -2) for t in (layer.keys, layer.values))

    def run() -> None:
        with torch.inference_mode():
            model(input_ids=text[:, -1:], past_key_values=cache, use_cache=True)

    return run


def _step(model: Any, job: Job, tokens: int, checkpointed: bool) -> Callable[[], object]:
    """A forward and a backward pass with the adapter and the head of the arm's trainer; a step of Adam is small."""
    import torch

    settings.fuse_head(model)
    everywhere = {k: v for k, v in job.recipe.lora.items() if k != "scope"}  # of few blocks, none lies behind a cut
    job = replace(job, recipe=job.recipe.model_copy(update={"lora": everywhere}))
    tuned = settings.adapted(job, model, checkpointed)
    autocast = torch.autocast(models.device().type, torch.bfloat16, enabled=settings.has_bf16())
    ids = _ids(model, ROWS, tokens // ROWS)
    seen = torch.ones_like(ids)

    def run() -> None:
        with autocast:
            loss = tuned(input_ids=ids, attention_mask=seen, labels=ids, use_cache=False, fused_lm_head=True).loss
        loss.backward()
        tuned.zero_grad()

    return run


def _in_turns(works: Sequence[Callable[[], object]], seconds: float = 2 * SHARE) -> list[float]:
    """The least time of each, in turns, so that what else the device does hits all alike; at least twice, warmed up.

    The least: other work can only add to a time.
    """
    import torch

    found: list[list[float]] = [[] for _ in works]
    start = time.perf_counter()
    while len(found[-1]) < 3 or time.perf_counter() - start < seconds:
        for work, times in zip(works, found, strict=True):
            before = time.perf_counter()
            work()
            if models.device().type != "cpu":
                torch.accelerator.synchronize()
            times.append(time.perf_counter() - before)
        if len(found[-1]) >= TURNS:
            break
    return [min(times[1:]) for times in found]
