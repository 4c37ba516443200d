"""Greedy texts of a batch of prompts, where a row that is finished is computed no further."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: torch.Tensor,
    mask: torch.Tensor,
    stop: Sequence[str],
    max_length: int,
    leave: bool,
) -> torch.Tensor:
    """`model.generate` without sampling; each row ends at its own stop string, end token, or `max_length`.

    The model's generation config must ask for nothing else (`models.own_distribution`): `generate` follows it.

    Args:
        prompts: token ids, padded on the left, [B, P].
        mask: 0 where padding is, [B, P].
        stop: texts at which a row ends; they stay in it.
        max_length: tokens of a prompt, padding included, and its continuation.
        leave: the cache can lose rows (transformers' own DynamicCache can, whatever its layers are), so that finished
            ones leave the batch; without it they are padded, and the batch ends when all are finished.

    Returns:
        Prompts with continuations, padded on the right, [B, at most max_length].
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    found = torch.full((len(prompts), max_length), tokenizer.pad_token_id, device=prompts.device)
    rows, ids, cache = torch.arange(len(prompts), device=prompts.device), prompts, None
    while len(rows):
        criterion = _Ended(tokenizer, stop, prompts.shape[1], ends, together=leave)
        out = model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_length=max_length,
            stopping_criteria=StoppingCriteriaList([criterion]),
            pad_token_id=tokenizer.pad_token_id,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
        )
        ids = out.sequences
        found[rows, : ids.shape[1]] = ids
        if not leave or ids.shape[1] >= max_length:
            break
        kept = (~criterion.done).nonzero()[:, 0]
        rows, ids, cache = rows[kept], ids[kept], out.past_key_values
        new = mask.new_ones(len(kept), ids.shape[1] - mask.shape[1])
        mask = torch.cat([mask[kept], new], 1)
        if len(kept):
            cache.reorder_cache(kept)  # for beams, but it takes fewer rows too, and every kind of layer has it
    return found


class _Ended(StoppingCriteria):
    """Which rows have ended. `together`: generation stops for all rows as soon as one has."""

    def __init__(
        self, tokenizer: Any, stop: Sequence[str], prompt: int, ends: Collection[int | None], together: bool
    ) -> None:
        self._tokenizer, self._stop, self._prompt, self._ends, self._together = tokenizer, stop, prompt, ends, together
        # as lm-eval: two tokens more than the longest stop string has, which the model may spell in other tokens
        longest = max((len(tokenizer.encode(s, add_special_tokens=False)) for s in stop), default=0)
        self._window = longest + 2
        self.done = torch.empty(0)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        tails = input_ids[:, self._prompt :][:, -self._window :]
        texts = self._tokenizer.batch_decode(tails)
        ended = [
            last in self._ends or any(s in text for s in self._stop if s)
            for last, text in zip(tails[:, -1].tolist(), texts, strict=True)
        ]
        self.done = torch.tensor(ended, device=input_ids.device)  # [B]
        return self.done.any().expand(len(ended)) if self._together else self.done
