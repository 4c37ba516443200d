"""Engines behind one small protocol: `generate(requests, sampling, seed) -> completions`, in the requests' order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hfsd import chat
from hfsd.errors import HfsdError
from hfsd.recipe import Endpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Request:
    """One conversation that ends with a user turn."""

    id: str
    messages: list[dict[str, str]]


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


class Transformers:
    """One padded batch through `model.generate`; the same batch and seed give the same text."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model, tokenizer

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        import torch

        texts = [chat.render(self.tokenizer, r.messages) for r in requests]
        self.tokenizer.padding_side = "left"
        batch = self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt").to(self.model.device)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            options = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        torch.manual_seed(seed)
        with torch.inference_mode():
            out = self.model.generate(
                **batch, max_new_tokens=sampling.max_new_tokens, pad_token_id=self.tokenizer.pad_token_id, **options
            )  # [B, P + N]
        new = out[:, batch["input_ids"].shape[1] :].tolist()
        return [self._completion(r.id, tokens) for r, tokens in zip(requests, new, strict=True)]

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


class Remote:
    """Any OpenAI-compatible server, with bounded concurrency and retries with backoff."""

    name = "endpoint"

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self.endpoint, self.model = endpoint, endpoint.model or model

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        return asyncio.run(self._all(requests, sampling, seed))

    async def _all(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        from huggingface_hub import AsyncInferenceClient, get_token

        gate = asyncio.Semaphore(self.endpoint.concurrency)
        token = get_token() or "none"  # vLLM wants no key, the client wants one
        async with AsyncInferenceClient(
            base_url=self.endpoint.url, api_key=token, timeout=self.endpoint.timeout
        ) as client:

            async def one(request: Request) -> Completion:
                async with gate:
                    return await self._one(client, request, sampling, seed)

            return await asyncio.gather(*(one(r) for r in requests))

    async def _one(self, client: Any, request: Request, sampling: Sampling, seed: int) -> Completion:
        for attempt in range(self.endpoint.retries + 1):
            try:
                answer = await client.chat_completion(
                    messages=request.messages,
                    model=self.model,
                    max_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    seed=seed,
                )
                break
            except Exception as error:
                if not _worth_retrying(error):
                    raise HfsdError(
                        f"rewrite.endpoint {self.endpoint.url}: {_why(error)}; check its URL and model name"
                    ) from error
                if attempt == self.endpoint.retries:
                    raise HfsdError(
                        f"rewrite.endpoint {self.endpoint.url}: {_why(error)} after {attempt + 1} tries; "
                        "run again when the server is back: finished batches are kept"
                    ) from error
                await asyncio.sleep(min(30.0, 0.5 * 2**attempt))
        choice = answer.choices[0]
        finish = "stop" if choice.finish_reason in ("stop", "eos_token") else "length"
        used = answer.usage.completion_tokens if answer.usage else 0
        return Completion(request.id, (choice.message.content or "").strip(), used, finish)


def _worth_retrying(error: Exception) -> bool:
    """429, 5xx, time-outs and connection faults may pass; anything else will not."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, InferenceTimeoutError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        return error.response.status_code == 429 or error.response.status_code >= 500
    return isinstance(error, InferenceTimeoutError | HTTPError | ConnectionError | TimeoutError)


def _why(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
