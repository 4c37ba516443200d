"""vLLM in this process, where `import vllm` succeeds: one `LLM` with prefix caching.

Data parallelism is `vllm serve --data-parallel-size N` behind one URL, through `endpoint`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from hfsd import chat
from hfsd.blocks_cut import Model
from hfsd.engines import Answered, Batch, Completion, Engine, Request, Sampling, no_room
from hfsd.errors import BadRequest

AT_ONCE = 8  # planned batches in one call, of which all but the last rows keep vLLM's own batch full


class InProcess(Engine):
    """One `LLM` of the original.

    Args:
        folder: the checkpoint.
        tensor_parallel: accelerators that share each layer.

    Raises:
        BadRequest: vLLM is not installed here.
    """

    name = "vllm"

    def __init__(self, folder: Path, tensor_parallel: int, model: Model, **options: Any) -> None:
        try:
            from vllm import LLM
        except ImportError:
            raise BadRequest(
                "rewrite.engine: vllm needs vLLM in this environment; install it, or start `vllm serve` in one of its "
                "own and use rewrite.engine: endpoint"
            ) from None
        self.llm = LLM(
            model=str(folder),
            dtype=model.dtype,
            tensor_parallel_size=tensor_parallel,
            enable_prefix_caching=True,
            trust_remote_code=model.trust_remote_code,
            **options,
        )
        self.tokenizer = self.llm.get_tokenizer()
        self.limit = int(self.llm.llm_engine.model_config.max_model_len)

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        ((_, made),) = self.stream([Batch(requests, seed)], sampling)
        return made

    def stream(
        self, batches: Iterable[Batch], sampling: Sampling
    ) -> Generator[tuple[int, list[Completion]], None, None]:
        waiting = enumerate(batches)
        while group := list(islice(waiting, AT_ONCE)):
            rows = [(request, batch.seed) for _, batch in group for request in batch.requests]
            made = iter(self._generated(rows, sampling))
            for place, batch in group:
                yield place, list(islice(made, len(batch.requests)))

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        from vllm import SamplingParams

        pairs = [chat.answer_ids(self.tokenizer, messages, text) for messages, text in answers]
        # One token has to be generated behind each.
        fit = {i: pair for i, pair in enumerate(pairs) if pair[1] and sum(map(len, pair)) < self.limit}
        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        outs = self._run([head + tail for head, tail in fit.values()], asked)
        found: list[float | None] = [None] * len(pairs)
        for (i, (head, tail)), out in zip(fit.items(), outs, strict=True):
            logs = [entry[token].logprob for entry, token in zip(out.prompt_logprobs[len(head) :], tail, strict=True)]
            found[i] = -sum(logs) / len(logs)
        return found

    def _generated(self, rows: Sequence[tuple[Request, int]], sampling: Sampling) -> list[Completion]:
        """All rows, each with the seed of its batch, in one call; one without room would end the call for all."""
        from vllm import SamplingParams

        prompts = [self._ids(chat.render(self.tokenizer, request.messages)) for request, _ in rows]
        fit = [i for i, ids in enumerate(prompts) if len(ids) < self.limit]
        asked = [
            SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_new_tokens,
                seed=rows[i][1],
            )
            for i in fit
        ]
        outs = dict(zip(fit, self._run([prompts[i] for i in fit], asked), strict=True))
        return [
            _completion(request.id, outs[i].outputs[0]) if i in outs else no_room(request.id, len(ids), self.limit)
            for i, ((request, _), ids) in enumerate(zip(rows, prompts, strict=True))
        ]

    def _run(self, prompts: Sequence[list[int]], asked: Any) -> Sequence[Any]:
        tokens = [{"prompt_token_ids": ids} for ids in prompts]
        return self.llm.generate(tokens, asked, use_tqdm=False) if tokens else []

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _completion(id: str, out: Any) -> Completion:
    return Completion(id, out.text.strip(), len(out.token_ids), "stop" if out.finish_reason == "stop" else "length")
