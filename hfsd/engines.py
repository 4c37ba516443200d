"""Engines behind one small protocol: conversations in, completions out, in the same order.

Beside this module's engine, which is `transformers`' own `generate`: `endpoint` and `vllm_engine`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from hfsd import chat, models
from hfsd.errors import HfsdError
from hfsd.records import Message

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


R = TypeVar("R")
Answered = tuple[list[Message], str]  # a conversation that ends with a user turn, and the answer to it


@dataclass(frozen=True)
class Request:
    """One conversation that ends with a user turn."""

    id: str
    messages: list[Message]


@dataclass(frozen=True)
class Batch:
    """A planned batch, which is generated and kept as a whole, and the seed of its draws."""

    requests: Sequence[Request]
    seed: int


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

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        """One batch."""
        ...

    def stream(
        self, batches: Iterable[Batch], sampling: Sampling
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        """Each batch with its place in `batches`, as soon as it is whole.

        Here one by one; an engine that does better on many rows works on several at once.
        """
        for place, batch in enumerate(batches):
            yield place, self.generate(batch.requests, sampling, batch.seed)

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        """Loss per token of each answer after its conversation; None: this engine cannot tell."""
        ...


class Transformers(Engine):
    """`model.generate` on padded batches that fit a budget of tokens; the same batch and seed give the same text.

    Out of memory, it halves the batch and goes on, and stays with the smaller one. An answer ends where the model's
    positions end. Tokens are drawn from the model's own distribution by `Sampling` alone: of what the checkpoint's
    generation config says (a repetition penalty, say) only the special tokens count.

    Args:
        batch_tokens: tokens computed at once: rows times (longest prompt + new tokens).
    """

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_tokens: int = 1 << 15) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.budgets = dict.fromkeys(("generate", "score"), batch_tokens)  # one may run out of memory, not the other
        self.limit = positions(model.config)
        self._keeps_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        made = self.tokens(requests, sampling, seed)
        return [
            self._completion(r.id, answer) if answer else no_room(r.id, len(prompt), self.limit)
            for r, (prompt, answer) in zip(requests, made, strict=True)
        ]

    def tokens(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[tuple[list[int], list[int]]]:
        """Token ids of each prompt and of its answer, the end-of-turn token included; no answer where no room is."""
        prompts = [self._ids(chat.render(self.tokenizer, r.messages)) for r in requests]
        rooms = [min(sampling.max_new_tokens, (self.limit or 1 << 62) - len(p)) for p in prompts]
        new: dict[int, list[int]] = {}
        for room in sorted({r for r in rooms if r > 0}, reverse=True):  # a batch stops at one length
            sizes = {i: len(p) + room for i, p in enumerate(prompts) if rooms[i] == room}
            new |= self._in_batches("generate", sizes, partial(self._generated, prompts, room, sampling, seed))
        return [(prompt, self._to_its_end(new.get(i, []))) for i, prompt in enumerate(prompts)]

    def text(self, tokens: Sequence[int]) -> str:
        """What an answer's tokens say, less the one that ends the turn."""
        kept = tokens[:-1] if tokens and tokens[-1] in self._ends() else tokens
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        pairs = [chat.answer_ids(self.tokenizer, messages, text) for messages, text in answers]
        sizes = {i: len(head) + len(tail) for i, (head, tail) in enumerate(pairs) if tail}
        fit = {i: size for i, size in sizes.items() if self.limit is None or size <= self.limit}
        scored = self._in_batches("score", fit, partial(self._scored, pairs))
        return [scored.get(i) for i in range(len(pairs))]

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _in_batches(self, kind: str, sizes: Mapping[int, int], work: Callable[[list[int]], list[R]]) -> dict[int, R]:
        """`work` on rows of these sizes, longest first, in batches that fit the budget of their kind."""
        from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

        found: dict[int, R] = {}
        waiting = sorted(sizes, key=lambda i: (-sizes[i], i))
        while waiting:
            rows = waiting[: max(1, self.budgets[kind] // sizes[waiting[0]])]
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
                self.budgets[kind] = len(rows) // 2 * sizes[rows[0]]
                continue
            waiting = waiting[len(rows) :]
        return found

    def _generated(
        self, prompts: Sequence[list[int]], room: int, sampling: Sampling, seed: int, rows: list[int]
    ) -> list[list[int]]:
        """At most `room` tokens after each of these rows' prompts."""
        import torch

        torch.manual_seed(seed + rows[0])  # not once for all: a try that ran out of memory has drawn numbers too
        self.tokenizer.padding_side = "left"
        padded = self.tokenizer.pad({"input_ids": [prompts[i] for i in rows]}, return_tensors="pt")
        batch = padded.to(self.model.device)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        with torch.inference_mode(), models.own_distribution(self.model):
            out = self.model.generate(
                **batch, max_new_tokens=room, pad_token_id=self.tokenizer.pad_token_id, **options
            )  # [B, P + N]
        return out[:, batch["input_ids"].shape[1] :].tolist()

    def _scored(self, pairs: Sequence[tuple[list[int], list[int]]], rows: list[int]) -> list[float]:
        """Mean loss of each answer's tokens after its head."""
        import torch

        chosen = [pairs[i] for i in rows]
        self.tokenizer.padding_side = "right"
        padded = self.tokenizer.pad({"input_ids": [h + t for h, t in chosen]}, return_tensors="pt")
        batch = padded.to(self.model.device)
        first = min(len(head) for head, _ in chosen) - 1  # predicts the first token that is scored
        keep = batch["input_ids"].shape[1] - first
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        with torch.inference_mode():
            logits = self.model(**batch, use_cache=False, **options).logits[:, -keep:]  # [B, T - first, V]
        found = []
        for row, (head, tail) in zip(logits, chosen, strict=True):
            at = slice(len(head) - 1 - first, len(head) + len(tail) - 1 - first)
            targets = torch.tensor(tail, device=row.device)
            found.append(torch.nn.functional.cross_entropy(row[at].float(), targets).item())
        return found

    def _to_its_end(self, tokens: list[int]) -> list[int]:
        """Without the padding behind the token that ends the turn."""
        ends = self._ends()
        at = next((i for i, t in enumerate(tokens) if t in ends), len(tokens))
        return tokens[: at + 1]

    def _completion(self, id: str, tokens: list[int]) -> Completion:
        return Completion(id, self.text(tokens), len(tokens), "stop" if tokens[-1] in self._ends() else "length")

    def _ends(self) -> set[int]:
        """Tokens at which generate stops: the generation config's, else the tokenizer's."""
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        return set(ends) if isinstance(ends, list) else {int(ends)}


def no_room(id: str, n_tokens: int, limit: int | None) -> Completion:
    """What stands for a row whose prompt fills all of the model's positions."""
    return Completion(
        id, "", 0, f"failed: {n_tokens} tokens of prompt leave no room in the {limit} that the model reads"
    )


def positions(config: PreTrainedConfig) -> int | None:
    """How many tokens the model was made to read; None: its config does not say.

    Rotary positions that are stretched by a factor reach that much further; some configs state what they reach then.
    """
    text = config.get_text_config(decoder=True)
    stated = getattr(text, "max_position_embeddings", None)
    if not isinstance(stated, int) or stated < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return stated
    return max(stated, int((rope.get("original_max_position_embeddings") or stated) * (rope.get("factor") or 1)))
