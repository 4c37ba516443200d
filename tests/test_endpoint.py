"""An OpenAI-compatible server that throttles, fails, hangs, dies, comes back, is another's, or serves another model."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

from hfsd import endpoint, rewrite
from hfsd.blocks import Endpoint
from hfsd.blocks_recovery import Rewrite as RewriteRecipe
from hfsd.endpoint import Remote
from hfsd.engines import Batch, Request, Sampling
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.records import Example
from tests.servers import JsonHandler


class Server(ThreadingHTTPServer):
    """Answers with the last word of the question, or with `text`.

    `faults` are status codes to give first, `listing` those for /models; `act` gets the word and returns the status.
    """

    request_queue_size, daemon_threads = 256, True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.faults: list[int] = []
        self.listing: list[int] = []
        self.act: Callable[[str], int] = lambda word: 200
        self.text: str | None = None
        self.models: list[dict] | None = [{"id": "org/model"}]
        self.asked: list[dict] = []
        self.keys: set[str] = set()
        self.flying = self.most = 0
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def words(self) -> list[str]:
        return [body["messages"][-1]["content"].split()[-1] for body in self.asked]

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """A client that has gone is part of these tests."""


class Handler(JsonHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        word = body["messages"][-1]["content"].split()[-1]
        with self.server.lock:
            self.server.keys.add(self.headers["Authorization"])
            self.server.asked.append(body)
            self.server.flying += 1
            self.server.most = max(self.server.most, self.server.flying)
            fault = self.server.faults.pop(0) if self.server.faults else 200
        status = fault if fault != 200 else self.server.act(word)
        with self.server.lock:
            self.server.flying -= 1
        text = f"Echo {word}" if self.server.text is None else self.server.text
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        answer = {"choices": [choice], "usage": {"completion_tokens": 2, "prompt_tokens": 1, "total_tokens": 3}}
        answer |= {"id": "1", "created": 0, "model": body["model"], "object": "chat.completion"}
        self._send(status, answer if status == 200 else {"error": "no"})

    def do_GET(self) -> None:
        self.server.keys.add(self.headers["Authorization"])
        status = self.server.listing.pop(0) if self.server.listing else 200
        listed = {"object": "list", "data": self.server.models}
        self._send(404 if self.server.models is None else status, listed)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it forbids loopback too
    made = Server()
    yield made
    made.close()


def _remote(server: Server, names: tuple[str, ...] = (), **options: object) -> Remote:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return Remote(Endpoint(url=url, **options), "org/model", names)


def _requests(*words: str) -> list[Request]:
    return [Request(word, [{"role": "user", "content": f"say {word}"}]) for word in words]


SIX = _requests(*"012345")
ASKED = RewriteRecipe(batch_rows=3, task="instruction", mode="self", min_similarity=0)


def _rows(count: int) -> list[Example]:
    return [Example(f"e{i}", f"question {i}", f"so #### {i}") for i in range(count)]


def _log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "work" / "batches.jsonl").read_text().splitlines()]


def test_order_and_sampling_are_kept(server: Server) -> None:
    made = _remote(server, concurrency=3).generate(SIX, Sampling(17, 0.5, 0.9), seed=4)
    assert [(c.id, c.text, c.n_tokens, c.finish) for c in made] == [(f"{i}", f"Echo {i}", 2, "stop") for i in range(6)]
    body = server.asked[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("org/model", 17, 0.5, 4)


def test_what_may_pass_is_tried_again(server: Server) -> None:
    server.faults = [503, 429]
    assert len(_remote(server).generate(SIX[:2], Sampling(5), seed=0)) == 2
    for status, advice in ((404, "check its URL and model name"), (401, "rewrite.endpoint.api_key_env")):
        server.faults = [status]
        with pytest.raises(HfsdError, match=advice):
            _remote(server).generate(SIX[:1], Sampling(5), seed=0)
    server.faults = [500] * 9
    with pytest.raises(HfsdError, match="500 .*; rows failed 2 times; run again when it is back; finished batches are"):
        _remote(server, retries=1).generate(SIX[:1], Sampling(5), seed=0)


def test_the_waits_between_tries_grow(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    real = asyncio.sleep

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        await real(0)

    monkeypatch.setattr(asyncio, "sleep", sleep)
    server.faults = [500] * 8
    assert _remote(server, retries=8).generate(SIX[:1], Sampling(5), seed=0)[0].finish == "stop"
    assert [w for w in waits if w] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


@pytest.mark.parametrize("most", [3, endpoint.CONNECTIONS + 30])
def test_concurrency_is_what_is_in_flight(server: Server, most: int) -> None:
    full = threading.Barrier(most)

    def act(word: str) -> int:
        full.wait(20)  # comes back once that many are in flight
        return 200

    server.act = act
    asked = _requests(*map(str, range(2 * most)))
    made = _remote(server, concurrency=most).generate(asked, Sampling(5), seed=0)
    assert all(c.finish == "stop" for c in made) and server.most == most


def test_a_row_that_is_refused_is_given_up_with_the_reason(server: Server) -> None:
    server.faults = [400]
    first, second = _remote(server, concurrency=1).generate(SIX[:2], Sampling(5), seed=0)
    assert first.finish.startswith("failed: 400 ") and (first.text, first.n_tokens) == ("", 0)
    assert second.finish == "stop" and len(server.asked) == 2


def test_a_batch_of_refused_rows_is_recorded_and_a_request_that_is_always_refused_is_not(server: Server) -> None:
    server.act = lambda word: 413 if word in "01" else 200
    made = _remote(server).generate(SIX[:2], Sampling(5), seed=0)  # nothing was answered before
    assert [c.finish[:11] for c in made] == ["failed: 413"] * 2 and sorted(server.words) == ["0", "1", "Hello"]
    server.act = lambda word: 422
    with pytest.raises(HfsdError, match="422 .* even a question of one word is refused: check rewrite.max_new_tokens"):
        _remote(server).generate(SIX[:2], Sampling(5), seed=0)


def test_a_row_on_which_the_server_fails_is_given_up_while_it_answers_others(server: Server) -> None:
    server.act = lambda word: 500 if word == "0" else 200
    for words in ("012", "0"):  # also where it is the only row of the last batch
        first, *others = _remote(server, retries=1).generate(_requests(*words), Sampling(5), seed=0)
        assert first.finish.startswith("failed: 500 ") and all(c.finish == "stop" for c in others)
    server.act = lambda word: 429 if word == "0" else 200  # no row's fault
    with pytest.raises(HfsdError, match="429 .* run again, perhaps with a lower rewrite.endpoint.concurrency"):
        _remote(server, retries=0).generate(SIX, Sampling(5), seed=0)


def test_a_fault_that_has_passed_costs_no_row(server: Server) -> None:
    server.faults = [500] * 6
    made = _remote(server, retries=0).generate(SIX, Sampling(5), seed=0)
    assert [c.finish for c in made] == ["stop"] * 6


def test_a_server_that_hangs(server: Server) -> None:
    over = threading.Event()
    server.act = lambda word: over.wait(20) and 200 if word == "0" else 200
    try:
        first, *others = _remote(server, retries=0, timeout=0.5).generate(SIX, Sampling(5), seed=0)
        assert first.finish.startswith("failed: InferenceTimeoutError") and all(c.finish == "stop" for c in others)
        server.act = lambda word: over.wait(20) and 200
        with pytest.raises(HfsdError, match="InferenceTimeoutError: .*; run again when it is back"):
            _remote(server, retries=0, timeout=0.5).generate(SIX, Sampling(5), seed=0)
    finally:
        over.set()


def test_no_server(server: Server) -> None:
    server.close()
    with pytest.raises(HfsdError, match="ConnectError: .*; rows failed 1 times; run again when it is back"):
        _remote(server, retries=0).generate(SIX, Sampling(5), seed=0)


def test_a_server_that_dies_in_mid_batch_and_comes_back_loses_no_row(server: Server, tmp_path: Path) -> None:
    def act(word: str) -> int:
        if len(server.asked) == 5:  # the second row of the second batch
            server.close()
        return 200

    server.act = act
    remote = _remote(server, retries=0, concurrency=1)
    with pytest.raises(HfsdError, match="ConnectError: .*; finished batches are kept"):
        rewrite.run(lambda: remote, _rows(9), [], ASKED, "key", tmp_path)
    assert [line["batch"] for line in _log(tmp_path)] == [0] and len(server.asked) == 5
    back = Server(server.server_address[1])
    try:
        stats = rewrite.run(lambda: remote, _rows(9), [], ASKED, "key", tmp_path)
    finally:
        back.close()
    kept = [d["id"][1:] for d in _log(tmp_path)[0]["drafts"]]
    assert sorted(back.words) == sorted(set("012345678") - set(kept))  # each of the others once
    found = rewrite.read(tmp_path)
    assert [e.id for e, _ in found] == [f"e{i}" for i in range(9)] == [r.id for _, r in found]
    assert all(r.text == f"Echo {r.id[1:]}" for _, r in found) and stats.rows == 9


def test_batches_are_worked_on_together_and_each_is_kept_when_it_is_whole(server: Server, tmp_path: Path) -> None:
    def act(word: str) -> int:
        time.sleep(0.4 if int(word) % 6 == 0 else 0.01)
        return 200

    server.act = act
    batches = [Batch(_requests(*(str(6 * k + i) for i in range(6))), k) for k in range(8)]
    remote = _remote(server, concurrency=6)
    start = time.perf_counter()
    alone = [remote.generate(b.requests, Sampling(5), b.seed) for b in batches]
    middle = time.perf_counter()
    together = dict(remote.stream(batches, Sampling(5)))
    end = time.perf_counter()
    assert [together[k] for k in range(8)] == alone
    assert end - middle < 0.6 * (middle - start)
    seeds = {body["messages"][-1]["content"]: body["seed"] for body in server.asked}
    assert seeds == {r.messages[-1]["content"]: b.seed for b in batches for r in b.requests}

    server.act = lambda word: time.sleep(0.4 if word == "0" else 0.01) or 200
    rewrite.run(lambda: remote, _rows(30), [], ASKED, "key", tmp_path)
    order = [line["batch"] for line in _log(tmp_path)]
    assert sorted(order) == list(range(10)) and order[0] != 0  # the slow row's batch is not waited for
    assert [e.id for e, _ in rewrite.read(tmp_path)] == [f"e{i}" for i in range(30)]


def test_what_is_not_wanted_any_more_is_not_asked(server: Server) -> None:
    server.act = lambda word: time.sleep(0.02) or 200
    stream = _remote(server, concurrency=2).stream((Batch(_requests(*"0123"), k) for k in range(50)), Sampling(5))
    next(stream)
    stream.close()
    asked = len(server.asked)
    time.sleep(0.2)
    assert len(server.asked) <= asked + 2 < 20


def test_a_server_of_another_model_is_refused(server: Server) -> None:
    server.models = [{"id": "other/model"}]
    with pytest.raises(Refusal, match="serves other/model, not org/model; set rewrite.endpoint.model"):
        _remote(server).generate(SIX[:1], Sampling(5), seed=0)
    server.models = [{"id": "alias", "root": "/models/other"}]
    with pytest.raises(Refusal, match="alias is /models/other there, not the original org/model"):
        _remote(server, model="alias").generate(SIX[:1], Sampling(5), seed=0)
    assert not server.asked


@pytest.mark.parametrize(
    "root", ["/models/model", "/cache/1234", "/hub/models--org--model/snapshots/c0ffee", "org/model"]
)
def test_the_original_is_known_by_its_names(server: Server, root: str, capsys: pytest.CaptureFixture[str]) -> None:
    server.models = [{"id": "alias", "root": root}]
    remote = _remote(server, ("/other/cache/1234", "c0ffee"), model="alias")
    assert remote.generate(SIX[:1], Sampling(5), seed=0)[0].finish == "stop"
    assert capsys.readouterr().err == ""


def test_a_server_that_does_not_say_what_it_serves_is_told(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.models = [{"id": "gpt-4"}]
    assert _remote(server, model="gpt-4").generate(SIX[:1], Sampling(5), seed=0)[0].finish == "stop"
    assert "states only the name gpt-4; whose words these are is not checked" in capsys.readouterr().err
    server.models = None
    assert _remote(server).generate(SIX[:1], Sampling(5), seed=0)[0].finish == "stop"
    assert "/models lists no models (404); whose words these are is not checked" in capsys.readouterr().err


def test_a_list_that_is_not_there_yet_is_asked_for_before_anything_is_kept(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.listing, server.models = [503], [{"id": "other/model"}]
    with pytest.raises(Refusal, match="serves other/model, not org/model"):
        _remote(server).generate(SIX[:1], Sampling(5), seed=0)
    server.listing = [503, 503]
    assert _remote(server).generate(SIX[:1], Sampling(5), seed=0)[0].finish == "stop"
    assert "/models lists no models (503); whose words" in capsys.readouterr().err


def test_the_hubs_token_stays_with_the_hub(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    _remote(server).generate(SIX, Sampling(5), seed=0)
    assert server.keys == {"Bearer none"}
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(BadRequest, match="HF_TOKEN holds a token of the Hub, which http://127.0.0.1:.* is not"):
        _remote(server, api_key_env="HF_TOKEN")


@pytest.mark.parametrize(
    ("url", "sent"),
    [
        ("https://router.huggingface.co/v1", True),
        ("https://huggingface.co/v1", True),
        ("http://router.huggingface.co/v1", False),
        ("https://router.huggingface.co.evil.example/v1", False),
        ("https://evilhuggingface.co/v1", False),
        ("https://router.huggingface.co@evil.example/v1", False),
        ("https://evil.example/router.huggingface.co/v1", False),
    ],
)
def test_which_urls_are_the_hubs(url: str, sent: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "hf_secret")
    assert endpoint.key_for(Endpoint(url=url)) == ("hf_secret" if sent else "none")


def test_a_key_comes_from_the_variable_that_the_recipe_names(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", "k123")
    _remote(server, api_key_env="MY_KEY").generate(SIX, Sampling(5), seed=0)
    told = capsys.readouterr().err
    assert server.keys == {"Bearer k123"} and "127.0.0.1 gets the key in MY_KEY" in told and "k123" not in told
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(BadRequest, match="the variable MY_KEY is not set; export it with the key of 127.0.0.1"):
        _remote(server, api_key_env="MY_KEY")
    for key in ("sk-1234", "hf_abcd"):
        with pytest.raises(ValueError, match="is the name of an environment variable, not the key"):
            Endpoint(url="https://x/v1", api_key_env=key)


def test_half_a_character_is_kept_as_a_mark(server: Server, tmp_path: Path) -> None:
    server.text = "so \ud83d #### 0"
    run = [rewrite.run(lambda: _remote(server), _rows(2), [], ASKED, "key", tmp_path) for _ in range(2)]
    assert run[0].rows == 2 and {r.text for _, r in rewrite.read(tmp_path)} == {"so \ufffd #### 0"}
