"""Distances between the next-token distributions of two models along given texts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfsd.findings import Along

if TYPE_CHECKING:
    import torch

CHUNK = 128  # positions whose whole distributions are held in float32 at once


@dataclass(frozen=True)
class Text:
    """What is measured along: the tokens of `tail`, each given `head` and those of the tail before it."""

    id: str
    head: list[int]
    tail: list[int]


@dataclass(frozen=True)
class Distance:
    """Of another model from the original along one text, in the mean over its tokens.

    `kl` is KL(original || other) in nats, `top1` the share of tokens where both put the same one first, `first` the
    share of the text's tokens that the other puts first, `overlap` the sum over the vocabulary of the lesser of the two
    probabilities (1 - total variation); `accepted` is the same of both distributions at the temperature of sampling.
    """

    id: str
    tokens: int
    kl: float
    top1: float
    first: float
    overlap: float
    accepted: float


def logits(model: Any, text: Text) -> torch.Tensor:
    """A causal model's logits at the positions of the tail, [T, V] in its own type; no others where it can choose."""
    import torch

    forward = getattr(model, "get_base_model", lambda: model)().forward
    count = len(text.tail) + 1  # the last one is of what follows the text
    options = {"logits_to_keep": count} if "logits_to_keep" in inspect.signature(forward).parameters else {}
    with torch.inference_mode():
        ids = torch.tensor([text.head + text.tail], device=model.device)  # [1, P + T]
        return model(input_ids=ids, use_cache=False, **options).logits[0, -count:-1]


def distance(original: torch.Tensor, other: torch.Tensor, text: Text, temperature: float = 1.0) -> Distance:
    """Distances of two models' logits along a text.

    Args:
        original: logits of the model that the distance is from, [T, V].
        other: those of the model that it is to, [T, V].
        temperature: of `accepted` alone.
    """
    import torch

    sums = torch.zeros(5, dtype=torch.float64)
    for at in range(0, len(text.tail), CHUNK):
        part = slice(at, at + CHUNK)
        tail = torch.tensor(text.tail[part], device=original.device)
        sums += _sums(original[part], other[part].to(original.device), tail, temperature).cpu()
    return Distance(text.id, len(text.tail), *(sums / len(text.tail)).tolist())


def along(distances: Sequence[Distance]) -> Along:
    """Means over all tokens of several texts, at least one, with standard errors over the texts."""
    sizes = [d.tokens for d in distances]
    kls, overlaps = [d.kl for d in distances], [d.overlap for d in distances]
    return Along(
        kl=mean(kls, sizes),
        kl_stderr=stderr(kls, sizes),
        top1=mean([d.top1 for d in distances], sizes),
        overlap=mean(overlaps, sizes),
        overlap_stderr=stderr(overlaps, sizes),
        prompts=len(distances),
        n_tokens=sum(sizes),
        kls=kls,
    )


def mean(values: Sequence[float], sizes: Sequence[int]) -> float:
    """The mean over all tokens, from each text's own mean and number of tokens."""
    return sum(v * n for v, n in zip(values, sizes, strict=True)) / sum(sizes)


def stderr(values: Sequence[float], sizes: Sequence[int]) -> float | None:
    """Standard error of `mean`, texts being drawn at random: that of a ratio of two means (Cochran 1977, section 2.11).

    Tokens of one text depend on one another, so the spread is taken over texts. Of one text none is known: None.
    """
    count, centre = len(values), mean(values, sizes)
    if count == 1:
        return None
    squares = sum((n * (v - centre)) ** 2 for v, n in zip(values, sizes, strict=True))
    return math.sqrt(squares * count / (count - 1)) / sum(sizes)


def _sums(original: torch.Tensor, other: torch.Tensor, tail: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sums over positions of what `Distance` holds means of, in its order, [5]."""
    import torch

    p, q = original.float().log_softmax(-1), other.float().log_softmax(-1)  # [T, V]
    top_p, top_q = p.argmax(-1), q.argmax(-1)  # [T]
    overlap = accepted = torch.minimum(p.exp(), q.exp()).sum()
    if temperature != 1.0:
        tempered = ((x.float() / temperature).softmax(-1) for x in (original, other))
        accepted = torch.minimum(*tempered).sum()
    kl = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    return torch.stack([kl, (top_p == top_q).sum(), (top_q == tail).sum(), overlap, accepted]).double()
