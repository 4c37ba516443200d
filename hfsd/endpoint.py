"""The engine behind any OpenAI-compatible server or Inference Provider."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator, Collection, Generator, Iterable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from hfsd import chat
from hfsd.blocks import Endpoint
from hfsd.engines import Answered, Batch, Completion, Engine, Request, Sampling
from hfsd.errors import BadRequest, HfsdError, Refusal

CONNECTIONS = 100  # of one client; it lets further requests wait, and counts the wait into their time-out
OPEN = 4  # times the requests in flight: the rows of batches that are worked on, so that a slow row idles no slot
LONGEST_WAIT = 30.0  # seconds between two tries

Answer = Completion | Exception
Made = tuple[int, list[Completion]]
Slots = asyncio.Queue[Any]  # one client for each request that may be in flight


class Remote(Engine):
    """Chat completions with bounded concurrency and retries with backoff, of several batches at once.

    A row that the server refuses, or fails on again and again while it answers others, is given up with the reason in
    its `finish`. A server that is down stops the run, to be continued.

    Args:
        model: the original's Hub id or path; the server must serve it, under this name or `endpoint.model`.
        names: what else the original may be called there: its folder, its file, its commit.

    Raises:
        BadRequest: the variable with the server's key is not set, or is the Hub's and the server is another's.
    """

    name = "endpoint"

    def __init__(self, endpoint: Endpoint, model: str, names: Collection[str | None] = ()) -> None:
        self.endpoint, self.original, self.model = endpoint, model, endpoint.model or model
        self._names = {model, *(name for name in names if name)}
        self._key = key_for(endpoint)
        self._checked = False  # whose words these are

    def generate(self, requests: Sequence[Request], sampling: Sampling, seed: int) -> list[Completion]:
        ((_, made),) = self.stream([Batch(requests, seed)], sampling)
        return made

    def stream(self, batches: Iterable[Batch], sampling: Sampling) -> Generator[Made, None, None]:
        self._check_model(answered=False)
        stream = self._made(batches, sampling)
        with asyncio.Runner() as runner:
            try:
                while (made := runner.run(_next(stream))) is not None:
                    self._check_model(answered=True)
                    yield made
            finally:
                runner.run(stream.aclose())

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        return [None] * len(answers)  # chat completions do not score a given text

    async def _made(self, batches: Iterable[Batch], sampling: Sampling) -> AsyncGenerator[Made, None]:
        """Batches as they are whole, at least two of them at once."""
        waiting, enough = enumerate(batches), OPEN * self.endpoint.concurrency
        running: dict[asyncio.Task[list[Completion]], tuple[int, int]] = {}  # task -> its batch's place and rows
        async with AsyncExitStack() as stack:
            slots = await self._slots(stack)
            try:
                while True:
                    while len(running) < 2 or sum(rows for _, rows in running.values()) < enough:
                        if (following := next(waiting, None)) is None:
                            break
                        place, batch = following
                        running[asyncio.create_task(self._batch(slots, batch, sampling))] = place, len(batch.requests)
                    if not running:
                        return
                    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for task in sorted(done, key=lambda t: t.exception() is not None):  # first what can be kept
                        place, _ = running.pop(task)
                        yield place, task.result()
            finally:
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)

    async def _slots(self, stack: AsyncExitStack) -> Slots:
        from huggingface_hub import AsyncInferenceClient

        slots: Slots = asyncio.Queue()
        for i in range(self.endpoint.concurrency):
            if i % CONNECTIONS == 0:
                client = AsyncInferenceClient(
                    base_url=self.endpoint.url, api_key=self._key, timeout=self.endpoint.timeout
                )
                await stack.enter_async_context(client)
            slots.put_nowait(client)
        return slots

    async def _batch(self, slots: Slots, batch: Batch, sampling: Sampling) -> list[Completion]:
        """Every row, answered or given up.

        Raises:
            HfsdError: the server is down, or takes no request of this form; the rows are not to blame.
        """
        tries = self.endpoint.retries + 1
        answers = await asyncio.gather(*(self._row(slots, r, sampling, batch.seed, tries) for r in batch.requests))
        left = [i for i, a in enumerate(answers) if isinstance(a, Exception) and not _rejects_row(a)]
        if left or not any(isinstance(a, Completion) for a in answers):
            await self._try_out(slots, sampling, batch.seed)
            again = [self._row(slots, batch.requests[i], sampling, batch.seed, 1) for i in left]
            for i, answer in zip(left, await asyncio.gather(*again), strict=True):
                answers[i] = answer
        for answer in answers:
            if isinstance(answer, Exception) and _never_reached_it(answer):
                raise self._stopped(answer, "run again, perhaps with a lower rewrite.endpoint.concurrency")
        return [
            Completion(r.id, "", 0, f"failed: {_why(a)}") if isinstance(a, Exception) else a
            for r, a in zip(batch.requests, answers, strict=True)
        ]

    async def _try_out(self, slots: Slots, sampling: Sampling, seed: int) -> None:
        """Asks one word, which tells a fault of the server or of the sampling from one of the rows."""
        answer = await self._row(slots, Request("", chat.single_turn("Hello")), sampling, seed, 1)
        if isinstance(answer, Exception):
            if _rejects_row(answer):
                raise self._stopped(
                    answer,
                    "even a question of one word is refused: check rewrite.max_new_tokens, temperature and top_p",
                )
            raise self._stopped(answer, f"rows failed {self.endpoint.retries + 1} times; run again when it is back")

    async def _row(self, slots: Slots, request: Request, sampling: Sampling, seed: int, tries: int) -> Answer:
        """The answer, or the error for which the row is given up."""
        client = await slots.get()
        try:
            for attempt in range(tries):
                if attempt:
                    await asyncio.sleep(min(LONGEST_WAIT, 0.5 * 2 ** (attempt - 1)))
                answer = await self._asked(client, request, sampling, seed)
                if isinstance(answer, Completion) or not _worth_retrying(answer):
                    break
            return answer
        finally:
            slots.put_nowait(client)

    async def _asked(self, client: Any, request: Request, sampling: Sampling, seed: int) -> Answer:
        """One try: the answer, or an error that is of this row or may pass."""
        try:
            answer = await client.chat_completion(
                messages=request.messages,
                model=self.model,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=seed,
            )
            choice = answer.choices[0]
        except Exception as error:
            if _rejects_row(error) or _worth_retrying(error):
                return error
            if _status(error) in (401, 403):
                raise self._stopped(error, "name the variable with its key: rewrite.endpoint.api_key_env") from error
            raise self._stopped(error, "check its URL and model name") from error
        finish = "stop" if choice.finish_reason in ("stop", "eos_token") else "length"
        used = answer.usage.completion_tokens if answer.usage else 0
        return Completion(request.id, _whole((choice.message.content or "").strip()), used, finish)

    def _stopped(self, error: Exception, advice: str) -> HfsdError:
        return HfsdError(f"rewrite.endpoint {self.endpoint.url}: {_why(error)}; {advice}; finished batches are kept")

    def _check_model(self, answered: bool) -> None:
        """Refuses a server that serves another model than the original. It is checked once.

        Args:
            answered: rows wait to be kept; before that, a server that is not there yet may still come.
        """
        if self._checked:
            return
        url = f"{self.endpoint.url.rstrip('/')}/models"
        served, why, may_pass = listed(url, self._key, self.endpoint.timeout)
        if served is None:
            self._checked = answered or not may_pass
            if self._checked:
                print(f"{url} lists no models ({why}); whose words these are is not checked", file=sys.stderr)
            return
        if self.model not in served:
            raise Refusal(
                f"rewrite.endpoint {self.endpoint.url} serves {', '.join(sorted(served)) or 'nothing'}, not "
                f"{self.model}; set rewrite.endpoint.model to its name for the original"
            )
        root = served[self.model] or self.model
        if not self._is_original(root):
            if root != self.model:
                raise Refusal(
                    f"rewrite.endpoint {self.endpoint.url}: {self.model} is {root} there, not the original "
                    f"{self.original}"
                )
            print(f"{url} states only the name {root}; whose words these are is not checked", file=sys.stderr)
        self._checked = True

    def _is_original(self, root: str) -> bool:
        return root in self._names or Path(root).name in {Path(name).name for name in self._names}


async def _next(stream: AsyncGenerator[Made, None]) -> Made | None:
    return await anext(stream, None)


def key_for(endpoint: Endpoint, where: str = "rewrite.endpoint") -> str:
    """What the server gets as a key. The Hub's token is for the Hub alone, whatever URL a shared recipe names.

    Args:
        where: the recipe's block, for messages.

    Raises:
        BadRequest: the variable with the key is not set, or holds the Hub's token for another server.
    """
    from huggingface_hub import get_token

    parts, variable = urlsplit(endpoint.url), endpoint.api_key_env
    host, safe = parts.hostname or "", parts.scheme == "https"
    if variable is None:
        return (get_token() if safe and _is_of(host, "huggingface.co") else None) or "none"
    key = os.environ.get(variable)
    if not key:
        raise BadRequest(f"{where}.api_key_env: the variable {variable} is not set; export it with the key of {host}")
    if key.startswith("hf_") and not (safe and _is_of(host, "huggingface.co", "endpoints.huggingface.cloud")):
        raise BadRequest(
            f"{where}.api_key_env: {variable} holds a token of the Hub, which {endpoint.url} is not; "
            "give that server a key of its own"
        )
    print(f"{where}: {host} gets the key in {variable}", file=sys.stderr)
    return key


def _is_of(host: str, *domains: str) -> bool:
    return any(host == domain or host.endswith(f".{domain}") for domain in domains)


def listed(
    url: str, key: str, timeout: float, where: str = "rewrite.endpoint"
) -> tuple[dict[str, str | None] | None, str, bool]:
    """What each served name is (None: not told); or None, with why it is not known, and whether that may pass."""
    from huggingface_hub.utils import get_session

    try:
        answer = get_session().get(url, headers={"Authorization": f"Bearer {key}"}, timeout=timeout)
    except Exception as error:
        if _worth_retrying(error):
            return None, _why(error), True
        raise HfsdError(f"{where} {url}: {_why(error)}; check its URL") from error
    if answer.status_code != 200:
        return None, str(answer.status_code), _may_pass(answer.status_code)
    try:
        return {m["id"]: m.get("root") for m in answer.json()["data"]}, "", False
    except (ValueError, KeyError, TypeError) as error:
        return None, f"answers with something else: {_why(error)}", False


def _status(error: Exception) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    return error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None


def _may_pass(status: int) -> bool:
    return status == 429 or status >= 500


def _rejects_row(error: Exception) -> bool:
    """A row that this server will not take, such as one longer than its context."""
    return _status(error) in (400, 413, 422)


def _never_reached_it(error: Exception) -> bool:
    """No connection, or too many requests: which row it was makes no difference."""
    cause = error.__cause__ or error  # the client wraps time-outs
    unreached = ("ConnectError", "ConnectTimeout", "PoolTimeout")  # of httpx or httpx2, as the client has it
    return _status(error) == 429 or type(cause).__name__ in unreached


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
    told = _whole(" ".join(f"{type(error).__name__}: {error}".split())[:200])
    return f"{status} {told}" if status else told


def _whole(text: str) -> str:
    """JSON can spell halves of characters (lone surrogates), which no file can hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
