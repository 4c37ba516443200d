"""The engine behind any OpenAI-compatible server or Inference Provider."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfsd.engines import Answered, Completion, Request, Sampling
from hfsd.errors import HfsdError, Refusal
from hfsd.recipe import Endpoint


class Remote:
    """Chat completions with bounded concurrency and retries with backoff.

    A row that the server refuses, or fails on again and again while others succeed, is given up with the reason in its
    `finish`. A server that is down stops the run, to be continued.

    Args:
        model: the original's Hub id or path; the server must serve it, under this name or `endpoint.model`.
    """

    name = "endpoint"

    def __init__(self, endpoint: Endpoint, model: str) -> None:
        self.endpoint, self.original, self.model = endpoint, model, endpoint.model or model
        self._known = False

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        return asyncio.run(self._all(requests, sampling, seed))

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        return [None] * len(answers)  # chat completions do not score a given text

    async def _all(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        from huggingface_hub import AsyncInferenceClient, get_token

        gate = asyncio.Semaphore(self.endpoint.concurrency)
        token = get_token() or "none"  # vLLM wants no key, the client wants one
        url, timeout = self.endpoint.url, self.endpoint.timeout
        async with AsyncInferenceClient(base_url=url, api_key=token, timeout=timeout) as client:
            if not self._known:
                self._check_model(token)

            async def one(request: Request) -> Completion | Exception:
                async with gate:
                    return await self._one(client, request, sampling, seed)

            answers = await asyncio.gather(*(one(r) for r in requests))
        failed = [a for a in answers if isinstance(a, Exception)]
        if len(failed) == len(answers):
            raise HfsdError(
                f"rewrite.endpoint {url}: {_why(failed[0])} after {self.endpoint.retries + 1} tries; "
                "run again when the server is back: finished batches are kept"
            ) from failed[0]
        return [
            Completion(r.id, "", 0, f"failed: {_why(a)}") if isinstance(a, Exception) else a
            for r, a in zip(requests, answers, strict=True)
        ]

    def _check_model(self, token: str) -> None:
        """Refuses a server that serves another model than the original."""
        from huggingface_hub.utils import get_session

        url = f"{self.endpoint.url.rstrip('/')}/models"
        try:
            answer = get_session().get(url, headers={"Authorization": f"Bearer {token}"}, timeout=self.endpoint.timeout)
        except Exception as error:
            if _worth_retrying(error):
                return  # not there yet: the requests themselves try again, and tell
            raise
        if _may_pass(answer.status_code):
            return
        self._known = True
        if answer.status_code != 200:
            print(
                f"{url} lists no models ({answer.status_code}); whose words these are is not checked", file=sys.stderr
            )
            return
        served = {m["id"]: m.get("root") or m["id"] for m in answer.json()["data"]}
        if self.model not in served:
            raise Refusal(
                f"rewrite.endpoint {self.endpoint.url} serves {', '.join(sorted(served)) or 'nothing'}, not "
                f"{self.model}; set rewrite.endpoint.model to its name for the original"
            )
        root = served[self.model]
        if root != self.model and Path(root).name != Path(self.original).name:
            raise Refusal(
                f"rewrite.endpoint {self.endpoint.url}: {self.model} is {root} there, not the original {self.original}"
            )

    async def _one(self, client: Any, request: Request, sampling: Sampling, seed: int) -> Completion | Exception:
        """The answer, or the error for which the row is given up."""
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
                if _rejects_row(error):
                    return error
                if not _worth_retrying(error):
                    raise HfsdError(
                        f"rewrite.endpoint {self.endpoint.url}: {_why(error)}; check its URL and model name"
                    ) from error
                if attempt == self.endpoint.retries:
                    return error
                await asyncio.sleep(min(30.0, 0.5 * 2**attempt))
        choice = answer.choices[0]
        finish = "stop" if choice.finish_reason in ("stop", "eos_token") else "length"
        used = answer.usage.completion_tokens if answer.usage else 0
        return Completion(request.id, (choice.message.content or "").strip(), used, finish)


def _status(error: Exception) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _may_pass(status: int) -> bool:
    return status == 429 or status >= 500


def _rejects_row(error: Exception) -> bool:
    """A row that this server will not take, such as one longer than its context."""
    return _status(error) in (400, 413, 422)


def _worth_retrying(error: Exception) -> bool:
    """429, 5xx, time-outs and connection faults may pass; anything else will not."""
    from huggingface_hub.errors import HTTPError, InferenceTimeoutError, OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return False
    if (status := _status(error)) is not None:
        return _may_pass(status)
    return isinstance(error, InferenceTimeoutError | HTTPError | ConnectionError | TimeoutError)


def _why(error: Exception) -> str:
    status = _status(error)
    told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return f"{status} {told}" if status else told
