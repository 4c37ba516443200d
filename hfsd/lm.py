"""The `hfsd` model type of lm-eval: its `hf` backend, with each question computed once and not once per choice.

Imports lm-eval and torch: only `evaluate` imports this module, and only when it evaluates.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hfsd.progress import Advance, track

log = logging.getLogger(__name__)

Answer = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would have written it
Tokens = tuple[int, ...]
SLACK = 16  # tokens computed again rather than opening another batch for a slightly longer shared prefix
STEM_CANDIDATES = 32  # choices compared pairwise; a question has 2 to 12, a perplexity task thousands of one context


@dataclass(frozen=True)
class _Scored:
    """One text to score: `tokens`, of which those from `start` on count (start >= 1)."""

    tokens: Tokens
    start: int


@register_model("hfsd")
class SharedContextLM(HFLM):
    """lm-eval's `hf` backend for a model in memory; equal log-likelihoods, fewer tokens computed.

    Of the texts that share a context, one is computed whole; the others continue from its KV cache where they part from
    it, as a batch. The output layer sees only the positions that are scored. Models whose cache is not plain (sliding
    windows, recurrent state) or whose positions depend on the total length take lm-eval's own path.

    Args:
        pretrained: a causal language model; it is put into eval mode and otherwise left as it is.
        tokenizer: its tokenizer. lm-eval may give it a padding token.
        batch_tokens: tokens per batch, padding included.
    """

    def __init__(self, pretrained: Any, tokenizer: Any, batch_tokens: int = 2048, **kwargs: Any) -> None:
        # the batch size is for lm-eval's own paths (generation, other caches); 512 tokens are taken for a usual text
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, batch_size=max(1, batch_tokens // 512), **kwargs)
        self.batch_tokens = batch_tokens
        base = pretrained.get_base_model() if hasattr(pretrained, "get_base_model") else pretrained
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        why = self._why_not_shared()
        if why:
            log.warning("evaluate: %s has %s; every choice is computed on its own", type(base).__name__, why)
        self.shares = not why

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Answer]:
        with track("evaluate", len(requests), "requests") as advance:
            self.cache_hook = _Ticks(advance)
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        with track("evaluate", len(requests), "requests") as advance:
            self.cache_hook = _Ticks(advance)
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        with track("evaluate", len(requests), "requests") as advance:
            self.cache_hook = _Ticks(advance)
            return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        if not self.shares:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        texts = [self._scored(context, continuation) for _, context, continuation in requests]
        waiting: dict[_Scored, list[int]] = {}
        for index, text in enumerate(texts):
            waiting.setdefault(text, []).append(index)
        answers: list[Answer] = [(0.0, False)] * len(texts)
        with torch.inference_mode():
            for text, answer in self._answers(list(waiting)):
                for index in waiting[text]:
                    answers[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
        return answers

    def _scored(self, context: list[int], continuation: list[int]) -> _Scored:
        """As lm-eval: what is too long loses tokens on the left, and the last token is predicted, not read."""
        if not context or not continuation or len(continuation) > self.max_length:
            raise ValueError(
                f"{len(context)} context and {len(continuation)} scored tokens; both must be there, and the model "
                f"reads at most {self.max_length}"
            )
        tokens = tuple((context + continuation)[-(self.max_length + 1) :])
        return _Scored(tokens, len(tokens) - len(continuation))

    def _answers(self, texts: Sequence[_Scored]) -> Iterable[tuple[_Scored, Answer]]:
        families: dict[Tokens, list[_Scored]] = {}
        for text in texts:
            families.setdefault(text.tokens[: text.start], []).append(text)
        for family in families.values():
            if len(family) > 1:
                yield from self._family(family)
        alone = sorted((f[0] for f in families.values() if len(f) == 1), key=lambda t: -len(t.tokens))
        for batch in _batches(alone, lambda t: len(t.tokens) - 1, self.batch_tokens):
            yield from self._alone(batch)

    def _alone(self, batch: Sequence[_Scored]) -> Iterable[tuple[_Scored, Answer]]:
        """Texts without relatives, padded on the right: causal attention never sees the padding."""
        longest = max(len(t.tokens) for t in batch) - 1
        first = min(t.start for t in batch) - 1  # the position that predicts the first scored token
        logits, _ = self._forward([t.tokens[:-1] for t in batch], longest - first)  # [B, T - first, V]
        for row, text in zip(logits, batch, strict=True):
            positions = row[text.start - 1 - first : len(text.tokens) - 1 - first]  # [C, V]
            yield text, _sum(*_score(positions, text.tokens[text.start :]))

    def _family(self, family: Sequence[_Scored]) -> Iterable[tuple[_Scored, Answer]]:
        """Texts of one context: the stem whole, the others from where they part from it."""
        start = family[0].start
        stem = _stem(family)
        logits, cache = self._forward([stem.tokens[:-1]], len(stem.tokens) - start, DynamicCache())
        rows = logits[0]  # [C, V]; row i predicts token start + i
        stem_scores = _score(rows, stem.tokens[start:])
        yield stem, _sum(*stem_scores)
        # the last token of either is only predicted: it is in no cache, and its row is needed
        shared = {
            t: min(_common(t.tokens, stem.tokens), len(t.tokens) - 1, len(stem.tokens) - 1)
            for t in family
            if t is not stem
        }
        for batch in _forks(shared, self.batch_tokens):
            part = shared[batch[0]]  # tokens that all of the batch share with the stem
            head = tuple(values[: part - start] for values in stem_scores)  # scored already, with the stem
            tails = self._tails(batch, part, cache)
            for row, text in zip(tails, batch, strict=True):
                first = rows[part - start : part - start + 1]  # [1, V]
                positions = torch.cat([first, row]) if len(row) else first  # [C, V]
                own = _score(positions[: len(text.tokens) - part], text.tokens[part:])
                yield text, _sum(*(torch.cat(pair) for pair in zip(head, own, strict=True)))

    def _tails(self, batch: Sequence[_Scored], part: int, cache: Any) -> torch.Tensor | list[torch.Tensor]:
        """Per text the logits of its tokens after the first own one, [longest, V]; `part` tokens are in the cache."""
        longest = max(len(t.tokens) for t in batch) - 1 - part
        if longest == 0:  # choices of one token: the stem has predicted them all
            return [torch.empty(0)] * len(batch)
        fork = DynamicCache()
        for index, layer in enumerate(cache.layers):
            keys, values = (kept[:, :, :part].expand(len(batch), -1, -1, -1) for kept in (layer.keys, layer.values))
            fork.update(keys, values, index)  # [B, heads, part, D]
        return self._forward([t.tokens[part:-1] for t in batch], longest, fork)[0]

    def _forward(self, inputs: Sequence[Tokens], keep: int, cache: Any = None) -> tuple[torch.Tensor, Any]:
        """Logits of the last `keep` positions of right-padded inputs, [B, keep, V] in float32, and the cache."""
        longest = max(map(len, inputs))
        padded = [list(tokens) + [0] * (longest - len(tokens)) for tokens in inputs]
        ids = torch.tensor(padded, dtype=torch.long, device=self.device)  # [B, T]
        options = {"logits_to_keep": keep} if self._keeps_logits else {}
        out = self.model(input_ids=ids, past_key_values=cache, use_cache=cache is not None, **options)
        return out.logits[:, -keep:].float(), out.past_key_values if cache is not None else None

    def _why_not_shared(self) -> str:
        """Why a prefix's cache cannot stand for the prefix; empty where it can."""
        if self.backend != "causal":
            return "an encoder"
        text = self.config.get_text_config()
        rope = f"{getattr(text, 'rope_parameters', '')} {getattr(text, 'rope_scaling', '')}"
        if "'dynamic'" in rope or "'longrope'" in rope:
            return "rotary positions that depend on the total length"
        try:
            with torch.inference_mode():
                cache = self._forward([(0, 0)], 1, DynamicCache(config=text))[1]
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            return f"a cache of its own ({type(error).__name__})"
        if type(cache) is not DynamicCache or not cache.layers:
            return f"a cache of its own ({type(cache).__name__})"
        kinds = {type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer}
        return f"a cache that is not of full attention ({', '.join(sorted(kinds))})" if kinds else ""


class _Ticks:
    """lm-eval tells its cache of every finished request: what moves the progress line."""

    def __init__(self, advance: Advance) -> None:
        self._advance = advance

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        self._advance(1)


def _score(logits: torch.Tensor, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token in nats, and whether it is the likeliest. logits: [C, V]; returns [C], [C]."""
    wanted = torch.tensor(tokens, device=logits.device)  # [C]
    # logsumexp is closer to the truth (float64), but on a CPU lm-eval's log_softmax is off by 1e-5 per token, and the
    # scores of both have to agree
    logprobs = torch.log_softmax(logits, dim=-1)  # [C, V]
    return logprobs.gather(1, wanted[:, None])[:, 0], logits.argmax(-1) == wanted


def _sum(scores: torch.Tensor, greedy: torch.Tensor) -> Answer:
    return float(scores.sum()), bool(greedy.all())


def _common(a: Tokens, b: Tokens) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _stem(family: Sequence[_Scored]) -> _Scored:
    """The text that leaves the fewest tokens to compute for the others."""
    some = family[:STEM_CANDIDATES]
    return max(some, key=lambda t: sum(_common(t.tokens, o.tokens) for o in some) - 2 * len(t.tokens))


def _forks(shared: dict[_Scored, int], budget: int) -> Iterable[list[_Scored]]:
    """Batches of texts that part from the stem at about the same place; the first of each parts earliest."""
    order = sorted(shared, key=lambda t: (shared[t], len(t.tokens)))
    while order:
        near = [t for t in order if shared[t] <= shared[order[0]] + SLACK]
        order = order[len(near) :]
        part = shared[near[0]]
        yield from _batches(near, lambda t, part=part: max(1, len(t.tokens) - 1 - part), budget)


def _batches(texts: Sequence[_Scored], length: Any, budget: int) -> Iterable[list[_Scored]]:
    """Cuts a list where a batch, padded to its longest, would pass the budget of tokens."""
    batch: list[_Scored] = []
    for text in texts:
        if batch and max(map(length, [*batch, text])) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
