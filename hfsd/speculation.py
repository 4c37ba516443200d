"""A smaller model drafts for a greater one (speculative decoding): what is expected of it, and what is measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hfsd import models
from hfsd.findings import Estimate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

GAMMAS = range(1, 9)  # drafted tokens per pass of the original
WARM_UP = 2  # tokens generated before the clock runs


@dataclass(frozen=True)
class Speedup:
    """How much faster the original decodes greedily with a draft model than alone; None: it cannot, and `said` why."""

    value: Estimate | None
    said: str


def tokens_per_pass(acceptance: float, gamma: int) -> float:
    """Expected tokens per pass of the original: (1 - a^(gamma + 1)) / (1 - a).

    Leviathan et al. 2023 (arXiv 2211.17192), equation 1, which takes the acceptances of tokens as independent.

    Args:
        acceptance: probability a that a drafted token is taken, 0 to 1.
        gamma: drafted tokens per pass.
    """
    return sum(acceptance**i for i in range(gamma + 1))  # the same sum, and no division by nought at a = 1


def best_gamma(acceptance: float, relative_cost: float) -> int:
    """The gamma of `GAMMAS` at which the greatest speed-up is expected (theorem 3.8 of the same paper).

    Args:
        relative_cost: time of a pass of the draft model over that of the original.
    """
    return max(GAMMAS, key=lambda gamma: tokens_per_pass(acceptance, gamma) / (gamma * relative_cost + 1))


def measure(
    original: PreTrainedModel, draft: PreTrainedModel, prompts: Sequence[tuple[list[int], int]], gamma: int
) -> Speedup:
    """Greedy decoding with transformers' `assistant_model` over greedy decoding without, in turns, prompt by prompt.

    Both follow their own distributions alone, as the acceptance does, whatever their generation configs say.

    Args:
        draft: drafts always `gamma` tokens.
        prompts: token ids of each, and how many tokens at most are generated after it.
    """
    with models.own_distribution(original), models.own_distribution(draft):
        config = draft.generation_config  # transformers reads of it how much is drafted
        config.num_assistant_tokens, config.num_assistant_tokens_schedule = gamma, "constant"
        config.assistant_confidence_threshold = 0.0  # else it drafts fewer where it is unsure
        warm_up = (prompts[0][0], min(WARM_UP, prompts[0][1]))
        try:
            _timed(original, warm_up, draft)
        except ValueError as error:  # transformers' word for a cache that cannot be rolled back
            return Speedup(None, f"no speed-up measured: {' '.join(str(error).split())[:200]}")
        turns = [(_timed(original, p), _timed(original, p, draft)) for p in prompts]
    plain, assisted = ([turn[i] for turn in turns] for i in (0, 1))
    ratios = [a.rate / p.rate for p, a in zip(plain, assisted, strict=True)]
    value = Estimate(_rate(assisted) / _rate(plain), min(ratios), max(ratios))
    return Speedup(value, _said(plain, assisted, gamma))


@dataclass(frozen=True)
class _Run:
    """One text and the seconds that it took."""

    tokens: list[int]
    seconds: float

    @property
    def rate(self) -> float:
        return len(self.tokens) / self.seconds


def _timed(original: PreTrainedModel, asked: tuple[list[int], int], draft: PreTrainedModel | None = None) -> _Run:
    import torch

    prompt, new_tokens = asked
    ids = torch.tensor([prompt], device=original.device)  # [1, P]
    end = original.generation_config.eos_token_id
    pad = end[0] if isinstance(end, list) else end  # nothing is padded; generate warns where it has none
    options = {"assistant_model": draft} if draft is not None else {}
    start = time.perf_counter()
    with torch.inference_mode():
        made = original.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=pad,
            **options,
        )
    tokens = made[0, len(prompt) :].tolist()  # waits for the device
    return _Run(tokens, time.perf_counter() - start)


def _rate(runs: Sequence[_Run]) -> float:
    return sum(len(r.tokens) for r in runs) / sum(r.seconds for r in runs)


def _said(plain: Sequence[_Run], assisted: Sequence[_Run], gamma: int) -> str:
    """How it was measured, and how many texts came out another way."""
    differ = sum(p.tokens != a.tokens for p, a in zip(plain, assisted, strict=True))
    texts = f"{differ} of {len(plain)} texts differ" if differ else "texts equal"
    return (
        f"greedy decoding with assistant_model over without, in turns, {len(plain)} prompts, "
        f"{sum(len(p.tokens) for p in plain)} tokens, gamma {gamma}, bounds: least and greatest prompt; {texts}"
    )
