"""Held-out loss of many cuts of one model, each computed only from the block where it begins to differ.

The blocks before a cut see what they saw without it. So one pass keeps the streams that enter the candidates' first
blocks, and each candidate's pass starts from its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hfsd import models, processes
from hfsd.calibration import Batch
from hfsd.errors import BadRequest, HfsdError
from hfsd.progress import track

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Blocks = tuple[int, ...]


class Verifier:
    """Measures losses on held-out batches while it is entered; the model itself is left as it was found.

    Args:
        model: the unpruned model.
        held_out: right-padded batches; only text tokens count.
    """

    def __init__(self, model: PreTrainedModel, held_out: Sequence[Batch]) -> None:
        self.model, self.held_out = model, held_out
        self.blocks = models.decoder_blocks(model)[1]
        self._removed: frozenset[int] = frozenset()
        self._given: dict[int, torch.Tensor] = {}  # block -> what it returns instead of computing
        self._wanted: frozenset[int] = frozenset()
        self._entering: dict[int, torch.Tensor] = {}  # block -> the stream that enters it, [B, T, D]
        self._tails: dict[int, tuple[Any, ...] | None] = {}  # what a block returns beside the stream; None: no tuple
        self._own: dict[int, Callable[..., Any] | None] = {}

    def __enter__(self) -> Verifier:
        for i, block in enumerate(self.blocks):
            self._own[i] = block.__dict__.get("forward")  # accelerate's, where the model is spread over devices
            block.forward = self._bypass(i, block.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for i, block in enumerate(self.blocks):
            del block.forward
            if self._own[i] is not None:
                block.forward = self._own[i]

    def losses(
        self, cuts: Sequence[Blocks] = (), base: Blocks = (), on: Sequence[Batch] | None = None
    ) -> tuple[float, list[float]]:
        """Mean next-token loss, in nats, over the text tokens of all batches.

        Args:
            cuts: blocks to remove, ascending, each set by itself and on top of `base`.
            base: blocks that are removed throughout.
            on: other batches than the held-out ones, such as a part of them.

        Returns:
            The loss without `base`, and the loss of each cut; infinite where it is no number.

        Raises:
            BadRequest: there is no text token to predict.
            HfsdError: the loss without `base`, or that of every cut, is no finite number.
        """
        batches = self.held_out if on is None else on
        sums, count = [0.0] * (len(cuts) + 1), 0
        with track("verify" if on is None else "screen", len(batches), "batches") as advance:
            for nats, tokens in processes.spread(lambda b: self._batch(b, cuts, base), batches):
                sums = [total + more for total, more in zip(sums, nats, strict=True)]
                count += tokens
                advance()
        if not count:
            raise BadRequest("scan: no text token to predict in the held-out sequences; raise scan.max_length")
        without, *each = (total / count for total in sums)
        if not math.isfinite(without):
            raise HfsdError("scan: the loss is NaN or infinite; try model.dtype: float32 or check the checkpoint")
        each = [loss if math.isfinite(loss) else math.inf for loss in each]  # such a cut is never chosen
        if each and min(each) == math.inf:
            raise HfsdError("scan: without the blocks of any candidate the loss is NaN or infinite; nothing can be cut")
        return without, each

    def _batch(self, batch: Batch, cuts: Sequence[Blocks], base: Blocks) -> tuple[list[float], int]:
        """Summed loss over one batch, of the base and of each cut, and the number of tokens scored."""
        import torch

        self._removed, self._given = frozenset(base), {}
        self._wanted = frozenset(cut[0] for cut in cuts)
        with torch.inference_mode():
            nats = [self._nats(batch)]
            entering, self._entering, self._wanted = self._entering, {}, frozenset()
            for cut in cuts:
                self._removed, self._given = frozenset((*base, *cut)), {}
                if cut[0] > 0:  # the stream goes in at block 0, and the blocks up to the cut hand it on
                    self._given = {0: entering[cut[0]]}
                    self._removed |= frozenset(range(1, cut[0]))
                nats.append(self._nats(batch))
        return nats, int(batch.text[:, 1:].sum())

    def _nats(self, batch: Batch) -> float:
        import torch.nn.functional as F

        logits = self.model(input_ids=batch.ids, attention_mask=batch.seen, use_cache=False).logits  # [B, T, V]
        wanted = batch.text[:, 1:].to(logits.device)  # [B, T-1]
        targets = batch.ids[:, 1:].to(logits.device)[wanted]  # [N]
        return F.cross_entropy(logits[:, :-1][wanted].float(), targets, reduction="sum").item()

    def _bypass(self, i: int, compute: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of block `i`, unless it is removed or its answer is given."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            stream = args[0] if args else kwargs["hidden_states"]
            if i in self._wanted:
                self._entering[i] = stream
            passed = i in self._given or i in self._removed
            if not passed or i not in self._tails:  # what a block returns beside the stream is learned by running it
                output = compute(*args, **kwargs)
                self._tails.setdefault(i, output[1:] if isinstance(output, tuple) else None)
                if not passed:
                    return output
            out, tail = self._given.get(i, stream), self._tails[i]
            return out if tail is None else (out, *tail)

        return forward
