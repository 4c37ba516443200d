"""vLLM in this process, where `import vllm` succeeds: one `LLM` with prefix caching.

Data parallelism is `vllm serve --data-parallel-size N` behind one URL, through `endpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfsd import chat
from hfsd.engines import Answered, Completion, Request, Sampling
from hfsd.errors import BadRequest
from hfsd.recipe import Model


class InProcess:
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

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        from vllm import SamplingParams

        asked = SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_new_tokens, seed=seed
        )
        prompts = [self._prompt(chat.render(self.tokenizer, r.messages)) for r in requests]
        answers = [out.outputs[0] for out in self.llm.generate(prompts, asked, use_tqdm=False)]
        return [
            Completion(r.id, a.text.strip(), len(a.token_ids), "stop" if a.finish_reason == "stop" else "length")
            for r, a in zip(requests, answers, strict=True)
        ]

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        from vllm import SamplingParams

        pairs = [chat.answer_ids(self.tokenizer, messages, text) for messages, text in answers]
        asked = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        prompts = [{"prompt_token_ids": head + tail} for head, tail in pairs]
        found: list[float | None] = []
        for out, (head, tail) in zip(self.llm.generate(prompts, asked, use_tqdm=False), pairs, strict=True):
            logs = [entry[token].logprob for entry, token in zip(out.prompt_logprobs[len(head) :], tail, strict=True)]
            found.append(-sum(logs) / len(logs) if logs else None)
        return found

    def _prompt(self, text: str) -> dict[str, Any]:
        return {"prompt_token_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]}
