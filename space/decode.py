"""Decoding of one column, a few tokens at a time, so that columns on shared weights can take turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Settings:
    """`temperature` 0 is greedy; `max_new_tokens` counts the end-of-turn token; one seed for every column."""

    max_new_tokens: int
    temperature: float = 0.0
    seed: int = 0


class Column:
    """A prompt being answered by one variant: its KV cache, its tokens, its own random numbers.

    Greedy decoding gives what `model.generate(do_sample=False)` gives. Sampling draws from the whole distribution at
    the temperature asked for: no top-k or top-p of a generation config, which would hide differences.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], settings: Settings) -> None:
        self.tokenizer, self.settings = tokenizer, settings
        self.tokens: list[int] = []
        self.seconds = 0.0
        self.done = False
        self._next = list(prompt_ids)  # not yet seen by the model
        self._cache: Any = None
        self._random: torch.Generator | None = None

    def advance(self, model: PreTrainedModel, seconds: float) -> None:
        """Decodes for about `seconds`, and at least one token."""
        import torch

        start = now = time.perf_counter()
        options = {"logits_to_keep": 1} if _keeps_logits(model) else {}
        ends = _ends(model, self.tokenizer)
        with torch.inference_mode():
            while not self.done and (now == start or now - start < seconds):
                token = self._step(model, options)
                self.done = token in ends or len(self.tokens) >= self.settings.max_new_tokens
                now = time.perf_counter()
        self.seconds += now - start
        if self.done:
            self._cache = None  # the other columns may need the memory

    def text(self) -> str:
        """The answer so far; half a character at its end (bytes of a longer one) waits for the rest."""
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=True).strip()
        return text if self.done else text.rstrip("\ufffd")

    def _step(self, model: PreTrainedModel, options: dict[str, Any]) -> int:
        import torch

        seen = torch.tensor([self._next], device=model.device)  # [1, T]
        out = model(input_ids=seen, past_key_values=self._cache, use_cache=True, **options)
        self._cache = out.past_key_values
        token = self._pick(out.logits[0, -1])
        self.tokens.append(token)
        self._next = [token]
        return token

    def _pick(self, logits: torch.Tensor) -> int:
        import torch

        if self.settings.temperature == 0:
            return int(logits.argmax())
        if self._random is None:
            self._random = torch.Generator(logits.device).manual_seed(self.settings.seed)
        shares = torch.softmax(logits.float() / self.settings.temperature, dim=-1)  # [V]
        return int(torch.multinomial(shares, 1, generator=self._random))


def _keeps_logits(model: PreTrainedModel) -> bool:
    """Whether the model can leave out the logits of all but the last position: [1, T, V] of a long prompt is large."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in signature(base.forward).parameters


def _ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens at which generate stops: the generation config's, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    return set(ends) if isinstance(ends, list) else {ends}
