"""The `hfsd` model type of lm-eval: its `hf` backend, with every shared beginning of texts computed once.

Imports lm-eval and torch: only `evaluate` imports this module, and only when it evaluates.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from hfsd import generation, models, prefixes, processes
from hfsd.prefixes import Node, Text, Tokens
from hfsd.progress import Advance, track

log = logging.getLogger(__name__)

Answer = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding would have written it
Scores = tuple[torch.Tensor, torch.Tensor]  # of tokens: log-probabilities in nats [C], and is each the likeliest [C]
GREEDY = {"attention_mask", "do_sample", "temperature", "top_p", "top_k"}  # what does not change a greedy text


@register_model("hfsd")
class SharedContextLM(HFLM):
    """lm-eval's `hf` backend: equal log-likelihoods and greedy texts, fewer tokens computed.

    Texts are scored by the tree of their beginnings (`prefixes`): a stretch that several share is read once, and what
    continues it does so from its cache of keys and values, in batches of whatever is alike. The output layer sees only
    the positions that are scored. The cache keeps all positions of sliding and chunked layers too, whose masks hide
    what is outside of their window, so they share at every length. Models with recurrent state or a cache of their own
    read every text whole, and those whose positions depend on the total length take lm-eval's own path, one text at a
    time, since padding would count. Greedy generation ends row by row (`generation`), and takes the likeliest token:
    what the checkpoint's generation config asks for beside, such as beams or a repetition penalty, is left out, where
    lm-eval's `hf` follows it and its `vllm` does not. Under a launcher of several processes each takes its part of the
    documents.

    Args:
        pretrained: a causal language model, which is put into eval mode and otherwise left as it is; or its name, with
            any other argument of lm-eval's `hf` model type.
        tokenizer: its tokenizer. lm-eval may give it a padding token.
        batch_tokens: tokens per batch, padding included. A batch keeps the keys and values of at most four times as
            many; where shared beginnings are nested, one such batch per depth is kept at a time.
    """

    cache_hook: Any
    batch_size_per_gpu: Any

    def __init__(self, pretrained: Any, tokenizer: Any = None, batch_tokens: int = 2048, **kwargs: Any) -> None:
        kwargs.setdefault("batch_size", 1)  # for what stays lm-eval's own path
        if kwargs.get("tp_plan") is not None:
            raise ValueError("tp_plan: the processes each take documents, and share no model; use lm-eval's `hf`")
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **kwargs)
        self.batch_tokens = batch_tokens
        if processes.count() > 1:
            processes.connect()
            self._rank, self._world_size = processes.rank(), processes.count()
        base = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        self._keeps_logits = "logits_to_keep" in inspect.signature(base.forward).parameters
        self._stock = self.backend != "causal"  # the log-likelihoods are lm-eval's to compute
        self._rows_leave = self._whole_window = False
        self._window: Advance = _untold
        why = self._why_not_shared()
        if why:
            log.warning("evaluate: %s has %s; every text is computed on its own", type(base).__name__, why)
        self.shares = not why
        self._packs = self.shares and self._whole_window and self._packs_well()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        from accelerate.utils import gather

        return gather(tensor) if self.world_size > 1 else tensor

    def barrier(self) -> None:
        processes.wait()

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[Answer]:
        with self._ticking(len(requests)):
            return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> list[float]:
        unit = "requests" if self._stock else "windows"
        with self._ticking(len(requests), unit), self._batch_size(self.batch_size if self._stock else 1 << 30):
            return super().loglikelihood_rolling(requests, disable_tqdm=True)

    def generate_until(self, requests: Any, disable_tqdm: bool = True) -> list[str]:
        """As lm-eval, in batches that fill the budget: rows times (longest context + new tokens)."""
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(repr(request.args[1]), []).append(index)
        texts: dict[int, str] = {}
        # where positions depend on the length, each text goes alone
        budget = 0 if self._stock and self.backend == "causal" else prefixes.WHOLE * self.batch_tokens
        with self._ticking(len(requests)):
            for indices in kinds.values():
                new = normalize_gen_kwargs(requests[indices[0]].args[1], self.max_gen_toks)["max_gen_toks"]
                lengths = [len(self.tok_encode(requests[i].args[0])) for i in indices]
                sizes = [min(length + new, self.max_length) for length in lengths]
                for batch in prefixes.fill(sizes, budget):
                    chosen = [indices[i] for i in batch]
                    with self._batch_size(len(chosen)):
                        made = super().generate_until([requests[i] for i in chosen], disable_tqdm=True)
                    texts |= dict(zip(chosen, made, strict=True))
        return [texts[i] for i in range(len(requests))]

    def _model_generate(self, context: Any, max_length: int, stop: list[str], **generation_kwargs: Any) -> Any:
        sampled = generation_kwargs.get("do_sample") or generation_kwargs.get("temperature", 0.0) != 0.0
        if self.backend != "causal":
            return super()._model_generate(context, max_length, stop, **generation_kwargs)
        with models.own_distribution(self.model):
            if sampled or generation_kwargs.keys() - GREEDY:
                return super()._model_generate(context, max_length, stop, **generation_kwargs)
            mask = generation_kwargs["attention_mask"]
            with torch.inference_mode(), self._precision():
                return generation.greedy(self.model, self.tokenizer, context, mask, stop, max_length, self._rows_leave)

    def _loglikelihood_tokens(
        self, requests: Any, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[Answer]:
        if self._stock:
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
        waiting: dict[Text, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            waiting.setdefault(self._text(context, continuation), []).append(index)
        answers: list[Answer] = [(0.0, False)] * len(requests)
        top = [(0, node, _NONE) for node in prefixes.tree(waiting, self.shares)]
        with torch.inference_mode():
            for text, answer in self._answers(top, None):
                for index in waiting[text]:
                    answers[index] = answer
                    if requests[index][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[index][0], answer)
                    else:
                        self._window(1, total=len(requests))
        return answers

    def _text(self, context: list[int], continuation: list[int]) -> Text:
        """As lm-eval: what is too long loses tokens on the left, and the last token is predicted, not read."""
        if not context or not continuation or len(continuation) > self.max_length:
            raise ValueError(
                f"{len(context)} context and {len(continuation)} scored tokens; both must be there, and the model "
                f"reads at most {self.max_length}"
            )
        tokens = tuple((context + continuation)[-(self.max_length + 1) :])
        return Text(tokens, len(tokens) - len(continuation))

    def _answers(self, nodes: Sequence[tuple[int, Node, Scores]], cache: Any) -> Iterator[tuple[Text, Answer]]:
        """Scores nodes and all that continues them.

        Args:
            nodes: with each, the row of its parent in the cache, and the scores of the tokens from its `low` to the
                first one that the parent has not read.
            cache: what the parents have read.
        """
        rows = {node: (row, head) for row, node, head in nodes}
        if self._packs:
            prefixes.pack(list(rows))
        for batch in prefixes.batches(list(rows), self.batch_tokens):
            part, stop = min(n.part for n in batch), max(n.stop for n in batch)
            first = min(n.first for n in batch)
            kept: Any = _fork(cache, [rows[n][0] for n in batch], part)
            if kept is None and any(n.children for n in batch):
                kept = DynamicCache()
            logits, kept = self._read(batch, part, stop - first, kept)  # [B, stop - first, V]
            below: list[tuple[int, Node, Scores]] = []
            for row, node in enumerate(batch):
                heads = {node: rows[node][1]}
                yield from self._scored(node, logits[row, : node.end - first], first, heads)
                for packed in node.packed:
                    inner = packed.node
                    at = slice(packed.start - first, packed.start - first + inner.end - inner.part)
                    yield from self._scored(inner, logits[row, at], inner.part, heads)
                below += [(row, child, heads[child]) for child in node.children]
            del logits
            if below:
                yield from self._answers(below, kept)
            kept = None  # before the next batch makes its own

    def _scored(
        self, node: Node, logits: torch.Tensor, first: int, heads: dict[Node, Scores]
    ) -> Iterator[tuple[Text, Answer]]:
        """The answers of a node's texts. Gives each continuation its head: what of its path is scored by then.

        logits: of the node's positions from `first` on, [C, V].
        """
        path, last = self._path(node, heads[node], logits, first)
        for text in node.texts:
            scores, greedy = _joined(path, last, text.tokens[node.end], text.start - node.low)
            yield text, (float(scores.sum()), bool(greedy.all()))
        inside = [p.node for p in node.packed if not p.above]
        for child in (*node.children, *inside):
            predicted = child.low <= node.end  # the child's first token is scored, or one before it
            heads[child] = _joined(path, last, child.tokens[node.end], child.low - node.low) if predicted else _NONE

    def _read(self, batch: Sequence[Node], part: int, keep: int, cache: Any) -> tuple[torch.Tensor, Any]:
        """A forward pass of nodes, each with what is packed behind it; see `_forward`."""
        tails = [[token for p in n.packed for token in p.node.tokens[p.node.part :]] for n in batch]
        inputs = [(*n.tokens[part:], *tail) for n, tail in zip(batch, tails, strict=True)]
        if not any(tails):
            return self._forward(inputs, keep, cache)
        longest = max(map(len, inputs))
        sees = torch.ones(longest, longest, dtype=torch.bool).tril().repeat(len(batch), 1, 1)  # [B, T, T]
        positions = torch.arange(part, part + longest).repeat(len(batch), 1)  # [B, T]
        for row, node in enumerate(batch):
            for packed in node.packed:
                start = packed.start - part
                end = start + packed.node.end - packed.node.part
                sees[row, start:end, node.end - part : start] = False
                for above in packed.above:
                    sees[row, start:end, above.start - part : above.start - part + above.node.end - above.node.part] = (
                        True
                    )
                positions[row, start:end] = torch.arange(packed.node.part, packed.node.end)
        mask = torch.zeros(len(batch), 1, longest, part + longest, dtype=self.model.dtype)
        mask[..., part:].masked_fill_(~sees[:, None], torch.finfo(mask.dtype).min)
        packs = {"attention_mask": mask.to(self.device), "position_ids": positions.to(self.device)}
        return self._forward(inputs, keep, cache, packs)

    def _path(self, node: Node, head: Scores, logits: torch.Tensor, first: int) -> tuple[Scores, torch.Tensor]:
        """Scores of the node's tokens from `low` on, and the log-probabilities of what comes next, [V].

        logits: of the positions from `first` on, [C, V].
        """
        start = max(node.low - 1, node.part)
        if start >= node.end:  # nothing is scored as early as that
            return _NONE, logits[0]
        # logsumexp is closer to the truth (float64), but on a CPU lm-eval's log_softmax is off by 1e-5 per token, and
        # the scores of both have to agree
        wanted = logits[start - first : node.end - first]  # [C, V]
        logprobs = torch.log_softmax(wanted, dim=-1, dtype=self.softmax_dtype)
        tokens = torch.tensor(node.tokens[start + 1 :], dtype=torch.long, device=logits.device)  # [C - 1]
        own = logprobs[:-1].gather(1, tokens[:, None])[:, 0], wanted[:-1].argmax(-1) == tokens
        return (torch.cat([head[0].to(own[0]), own[0]]), torch.cat([head[1].to(own[1]), own[1]])), logprobs[-1]

    def _forward(
        self, inputs: Sequence[Tokens], keep: int, cache: Any = None, packs: dict[str, Any] | None = None
    ) -> tuple[torch.Tensor, Any]:
        """Logits of the last `keep` positions of right-padded inputs, [B, keep, V] in float32, and the cache."""
        longest = max(map(len, inputs))
        padded = [list(tokens) + [0] * (longest - len(tokens)) for tokens in inputs]
        ids = torch.tensor(padded, dtype=torch.long, device=self.device)  # [B, T]
        options: dict[str, Any] = {"logits_to_keep": keep} if self._keeps_logits else {}
        with self._precision():
            out = self.model(
                input_ids=ids, past_key_values=cache, use_cache=cache is not None, **options, **(packs or {})
            )
        return out.logits[:, -keep:].float(), out.past_key_values if cache is not None else None

    def _precision(self) -> Any:
        dtype = self.mixed_precision_dtype
        return torch.autocast(device_type=self.device.type, dtype=dtype, enabled=dtype is not None)

    def _why_not_shared(self) -> str:
        """Why a prefix's cache cannot stand for the prefix; empty where it can."""
        if self.backend != "causal":
            return "an encoder"
        text = self.config.get_text_config()
        rope = f"{getattr(text, 'rope_parameters', '')} {getattr(text, 'rope_scaling', '')}"
        try:
            with torch.inference_mode():
                cache = self._forward([(0, 0)], 1, DynamicCache(config=text))[1]
        except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
            return f"a cache of its own ({type(error).__name__})"
        if type(cache) is not DynamicCache or not cache.layers:
            return f"a cache of its own ({type(cache).__name__})"
        self._rows_leave = True
        if "'dynamic'" in rope or "'longrope'" in rope:
            self._stock = True
            return "rotary positions that depend on the total length"
        kinds = {type(layer) for layer in cache.layers}
        self._whole_window = kinds == {DynamicLayer}
        others = sorted(kind.__name__ for kind in kinds - {DynamicLayer, DynamicSlidingWindowLayer})
        return f"a cache that is not of attention alone ({', '.join(others)})" if others else ""

    def _packs_well(self) -> bool:
        """Whether the class takes a mask and positions of ours, as a small tree of tokens shows."""
        inner = Node((1, 2, 3, 4, 1, 2), part=5)
        texts = [Node((1, 2, 3, 4, 1), part=3, children=[inner]), Node((1, 2, 3, 3), part=3)]
        root = Node((1, 2, 3), children=texts)
        prefixes.pack([root])
        with torch.inference_mode():
            try:
                packed = self._read([root], 0, root.stop, None)[0][0]  # [T, V]
            except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
                log.info("evaluate: rows are not packed: %s: %s", type(error).__name__, error)
                return False
            for found in root.packed:
                whole = self._forward([found.node.tokens], 1)[0][0, -1]  # [V]
                off = (packed[found.start + found.node.end - found.node.part - 1] - whole).abs().mean()
                if not off <= (1e-4 if self.model.dtype == torch.float32 else 0.02) * whole.std():
                    return False
        return True

    @contextmanager
    def _ticking(self, total: int, unit: str = "requests") -> Iterator[None]:
        """One line of progress: of requests, which lm-eval reports to its cache as they end, or of the windows of
        rolling texts, which it reports when all are read."""
        hook = self.cache_hook
        with track("evaluate", total, unit) as advance:
            if unit == "windows":
                self._window = advance
            else:
                self.cache_hook = _Ticks(advance, hook)
            try:
                yield
            finally:
                self.cache_hook, self._window = hook, _untold

    @contextmanager
    def _batch_size(self, size: Any) -> Iterator[None]:
        before, self.batch_size_per_gpu = self.batch_size_per_gpu, size
        try:
            yield
        finally:
            self.batch_size_per_gpu = before


def _untold(*_: Any, **__: Any) -> None:
    """The progress of windows that nobody waits for."""


class _Ticks:
    """lm-eval tells its cache of every finished request: what moves the progress line."""

    def __init__(self, advance: Advance, hook: Any) -> None:
        self._advance, self._hook = advance, hook

    def add_partial(self, kind: str, request: Any, result: Any) -> None:
        self._hook.add_partial(kind, request, result)
        self._advance(1)


_NONE: Scores = (torch.empty(0), torch.empty(0, dtype=torch.bool))


def _joined(path: Scores, last: torch.Tensor, token: int, skip: int) -> Scores:
    """The scores of a path from its token `skip` on, and of one token after it. last: log-probabilities, [V]."""
    one = last[token : token + 1]
    return torch.cat([path[0][skip:].to(one), one]), torch.cat(
        [path[1][skip:].to(one.device), last.argmax(-1, True) == token]
    )


def _fork(cache: Any, rows: Sequence[int], part: int) -> Any:
    """A cache of the first `part` positions of these rows; None of None."""
    if cache is None:
        return None
    fork = DynamicCache()
    for layer in cache.layers:
        copy = DynamicLayer()
        copy.lazy_initialization(layer.keys, layer.values)
        copy.keys, copy.values = (_rows(kept[:, :, :part], rows) for kept in (layer.keys, layer.values))
        fork.layers.append(copy)
    return fork


def _rows(kept: torch.Tensor, rows: Sequence[int]) -> torch.Tensor:
    """Rows of [B, heads, part, D]; of a single one, a view."""
    if len(kept) == 1:
        return kept.expand(len(rows), -1, -1, -1)
    return kept.index_select(0, torch.tensor(rows, device=kept.device))
