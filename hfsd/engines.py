"""Engines behind one small protocol: conversations in, completions out, in the same order.

Beside this module's engine, which is `transformers`' own `generate`: `endpoint` and `vllm_engine`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hfsd import chat
from hfsd.errors import HfsdError
from hfsd.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


R = TypeVar("R")
Answered = tuple[list[Message], str]  # a conversation that ends with a user turn, and the answer to it


@dataclass(frozen=True)
class Request:
    """One conversation that ends with a user turn."""

    id: str
    messages: list[Message]


@dataclass(frozen=True)
class Sampling:
    """`temperature` 0 is greedy; `max_new_tokens` counts the end-of-turn token."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Completion:
    """`finish` is `stop` (the model ended its turn), `length` (cut off), or `failed: <why>`."""

    id: str
    text: str
    n_tokens: int
    finish: str


class Engine(Protocol):
    """What rewriting needs of a generator."""

    name: str

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]: ...

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        """Loss per token of each answer after its conversation; None: this engine cannot tell."""
        ...


class Transformers:
    """`model.generate` on padded batches that fit a budget of tokens; the same batch and seed give the same text.

    Out of memory, it halves the batch and goes on, and stays with the smaller one.

    Args:
        batch_tokens: tokens computed at once: rows times (longest prompt + new tokens).
    """

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int = 1 << 15) -> None:
        self.model, self.tokenizer, self.budget = model, tokenizer, batch_tokens

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        import torch

        torch.manual_seed(seed)
        prompts = [self._ids(chat.render(self.tokenizer, r.messages)) for r in requests]
        new = self._in_batches(
            [len(p) + sampling.max_new_tokens for p in prompts],
            lambda rows: self._generated([prompts[i] for i in rows], sampling),
        )
        return [self._completion(r.id, tokens) for r, tokens in zip(requests, new, strict=True)]

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        pairs = [chat.answer_ids(self.tokenizer, messages, text) for messages, text in answers]
        scored = self._in_batches(
            [len(head) + len(tail) for head, tail in pairs], lambda rows: self._scored([pairs[i] for i in rows])
        )
        return [s if tail else None for s, (_, tail) in zip(scored, pairs, strict=True)]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _in_batches(self, sizes: Sequence[int], work: Callable[[list[int]], list[R]]) -> list[R]:
        """`work` on row numbers, longest rows first, in batches that fit the budget; results in the rows' order."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        found: dict[int, R] = {}
        waiting = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))
        while waiting:
            rows = waiting[: max(1, self.budget // max(1, sizes[waiting[0]]))]
            try:
                found |= dict(zip(rows, work(rows), strict=True))
            except Exception as error:
                if not should_reduce_batch_size(error):
                    raise
                if len(rows) == 1:
                    raise HfsdError(
                        f"one row of {sizes[rows[0]]} tokens does not fit in memory; lower rewrite.max_new_tokens or "
                        "data.max_chars"
                    ) from error
                clear_device_cache(garbage_collection=True)
                self.budget = len(rows) // 2 * sizes[rows[0]]
                continue
            waiting = waiting[len(rows) :]
        return [found[i] for i in range(len(sizes))]

    def _generated(self, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
        import torch

        self.tokenizer.padding_side = "left"
        batch = self.tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt").to(self.model.device)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode():
            out = self.model.generate(
                **batch, max_new_tokens=sampling.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **options
            )  # [B, P + N]
        return out[:, batch["input_ids"].shape[1] :].tolist()

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        """Mean loss of each answer's tokens after its head."""
        import torch

        self.tokenizer.padding_side = "right"
        batch = self.tokenizer.pad({"input_ids": [h + t for h, t in pairs]}, return_tensors="pt").to(self.model.device)
        with torch.inference_mode():
            logits = self.model(**batch, use_cache=False).logits  # [B, T, V]
        found = []
        for row, (head, tail) in zip(logits, pairs, strict=True):
            at = slice(len(head) - 1, len(head) + len(tail) - 1)
            targets = torch.tensor(tail, device=row.device)
            found.append(torch.nn.functional.cross_entropy(row[at].float(), targets).item() if tail else 0.0)
        return found

    def _completion(self, id: str, tokens: list[int]) -> Completion:
        ends = self._ends()
        at = next((i for i, t in enumerate(tokens) if t in ends), None)
        kept = tokens if at is None else tokens[:at]
        text = self.tokenizer.decode(kept, skip_special_tokens=True).strip()
        return Completion(id, text, len(kept) + (at is not None), "length" if at is None else "stop")

    def _ends(self) -> set[int]:
        """Tokens at which generate stops: the generation config's, else the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return set(ends) if isinstance(ends, list) else {int(ends)}
