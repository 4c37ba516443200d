"""Engines: batches equal single rows; an OpenAI-compatible server that fails, throttles and comes back."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from hfsd import chat, engines, models, rewrite
from hfsd.engines import Request, Sampling
from hfsd.errors import HfsdError
from hfsd.recipe import Endpoint
from hfsd.recipe import Rewrite as RewriteRecipe
from hfsd.records import Example


class Server(ThreadingHTTPServer):
    """Answers chat completions with the last word of the user's message; `faults` are status codes to give first."""

    faults: list[int]
    asked: list[dict]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.faults.pop(0) if self.server.faults else 200
        self.server.asked.append(body)
        last = body["messages"][-1]["content"].split()[-1]
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"Echo {last}"}}
        answer = {"choices": [choice], "usage": {"completion_tokens": 2, "prompt_tokens": 1, "total_tokens": 3}}
        answer |= {"id": "1", "created": 0, "model": body["model"], "object": "chat.completion"}
        raw = json.dumps(answer if status == 200 else {"error": "no"}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it forbids loopback too
    made = Server(("127.0.0.1", 0), Handler)
    made.faults, made.asked = [], []
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def _remote(server: Server, **options: object) -> engines.Remote:
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    return engines.Remote(Endpoint(url=url, **options), "org/model")


REQUESTS = [Request(f"r{i}", [{"role": "user", "content": f"say {i}"}]) for i in range(6)]


def test_transformers_batches_equal_single_rows(model_folder: Path) -> None:
    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    engine = engines.Transformers(model, tokenizer)
    asked = [Request(f"r{i}", chat.single_turn("word " * (i + 1))) for i in range(3)]
    together = engine.generate(asked, Sampling(10), seed=0)
    alone = [engine.generate([r], Sampling(10), seed=0)[0] for r in asked]
    assert together == alone and [c.id for c in together] == ["r0", "r1", "r2"]
    assert all(c.finish == "stop" or c.n_tokens == 10 for c in together)
    one, two = (engine.generate(asked, Sampling(10, temperature=1.0), seed=s) for s in (1, 1))
    assert one == two != engine.generate(asked, Sampling(10, temperature=1.0), seed=2)


def test_remote_keeps_order_and_passes_sampling_on(server: Server) -> None:
    made = _remote(server, concurrency=3).generate(REQUESTS, Sampling(17, 0.5, 0.9), seed=4)
    assert [(c.id, c.text, c.n_tokens, c.finish) for c in made] == [(f"r{i}", f"Echo {i}", 2, "stop") for i in range(6)]
    body = server.asked[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("org/model", 17, 0.5, 4)


def test_remote_tries_again_where_it_may_help(server: Server) -> None:
    server.faults = [503, 429]
    assert len(_remote(server).generate(REQUESTS[:2], Sampling(5), seed=0)) == 2
    server.faults = [404]
    with pytest.raises(HfsdError, match="check its URL and model name"):
        _remote(server).generate(REQUESTS[:1], Sampling(5), seed=0)
    server.faults = [500] * 9
    with pytest.raises(HfsdError, match=r"after 2 tries; run again when the server is back"):
        _remote(server, retries=1).generate(REQUESTS[:1], Sampling(5), seed=0)


def test_a_server_that_dies_and_comes_back_loses_no_row(server: Server, tmp_path: Path) -> None:
    rows = [Example(f"e{i}", f"question {i}", f"so #### {i}") for i in range(9)]
    asked = RewriteRecipe(batch_rows=3, task="instruction")
    remote = _remote(server, retries=0)
    server.faults = [200, 200, 200, 200, 500]
    with pytest.raises(HfsdError, match="finished batches are kept"):
        rewrite.run(lambda: remote, rows, asked, "key", tmp_path)
    (kept,) = (tmp_path / "work" / "batches.jsonl").read_text().splitlines()
    finished = {f"question {row.id[1:]}" for row in rows if f'"{row.id}"' in kept}
    stats = rewrite.run(lambda: remote, rows, asked, "key", tmp_path)
    times = Counter(f"question {n}" for body in server.asked for n in re.findall(r"question (\d)", str(body)))
    # Counted by question: a request of the failed batch may reach the server after the failure was raised.
    assert len(finished) == 3 and all(times[question] == 1 for question in finished)
    found = rewrite.read(tmp_path)
    assert [e.id for e, _ in found] == [r.id for r in rows] == [r.id for _, r in found]
    assert stats.rows == 9 and sum(stats.reasons.values()) == 9


def test_the_reference_is_asked_with_and_never_trained_with(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    row = Example("e", "a {reference} in the prompt", "the {prompt} reference")
    (asked,) = rewrite.requests([row], "instruction")
    text = asked.messages[-1]["content"]
    assert text.count("the {prompt} reference") == 1 and "a {reference} in the prompt" in text
    given = tmp_path / "mine.jsonl"
    given.write_text(json.dumps({"id": "e", "text": "my words"}) + "\n")
    rewrite.run(lambda: pytest.fail("no engine is needed"), [row], RewriteRecipe(**{"from": str(given)}), "k", tmp_path)
    sft, own = (pq.read_table(tmp_path / f"{arm}.parquet").to_pylist()[0] for arm in rewrite.ARMS)
    assert sft["prompt"] == own["prompt"] == [{"role": "user", "content": row.prompt}]
    assert sft["completion"][0]["content"] == row.reference and own["completion"][0]["content"] == "my words"
