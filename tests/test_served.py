"""Evaluation on other engines: a server with /v1/completions, and vLLM in this process (a stand-in for its class)."""

from __future__ import annotations

import json
import sys
import threading
import types
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from hfsd import pipeline, session, steps
from hfsd import work as doing
from hfsd.errors import BadRequest, HfsdError, Refusal
from tests import tiny
from tests.servers import JsonHandler
from tests.test_harness import arc, written

CUT = {"remove": "1:3"}


class Server(ThreadingHTTPServer):
    """OpenAI's completions, with echo and log-probabilities, of tiny models by name."""

    request_queue_size, daemon_threads = 64, True

    def __init__(self, models: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.models, self.tokenizer, self.faults = models, tiny.tokenizer(), [503]
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(JsonHandler):
    server: Server

    def do_GET(self) -> None:
        self._send(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        import torch

        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock, torch.no_grad():
            self.server.keys.add(self.headers["Authorization"])
            if self.server.faults:
                self._send(self.server.faults.pop(), {})
                return
            model, (ids,) = self.server.models[body["model"]], body["prompt"]
            if not body.get("echo"):
                made = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=body["max_tokens"])
                text = self.server.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True)
                for end in body["stop"] or []:
                    text = text.split(end)[0]
                self._send(200, {"choices": [{"index": 0, "text": text}]})
                return
            logs = torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1)  # [T, V]
        token = [None, *(float(logs[i, t]) for i, t in enumerate(ids[1:])), float(logs[-1].max())]
        top = [None, *({"best": float(row.max())} for row in logs)]
        logprobs = {"token_logprobs": token, "top_logprobs": top}
        self._send(200, {"choices": [{"index": 0, "logprobs": logprobs}]})


@pytest.fixture(scope="module")
def cut_run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has an original and a pruned model."""
    root = tmp_path_factory.mktemp("runs") / "cut"
    return pipeline.run(tiny.recipe(model_folder, prune=CUT), out=root, until="prune")


@pytest.fixture
def server(cut_run: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it forbids loopback too
    folders = {"whole": model_folder, "cut": cut_run / "prune" / "checkpoint"}
    made = Server({name: AutoModelForCausalLM.from_pretrained(folder) for name, folder in folders.items()})
    yield made
    made.shutdown()
    made.server_close()


class Run:
    """The evaluation of a run's original and pruned model, in a folder of its own."""

    def __init__(self, cut_run: Path, model_folder: Path, root: Path, **changes: Any) -> None:
        root.mkdir(parents=True)
        (root / "prune").symlink_to(cut_run / "prune")
        self.recipe, self.root = tiny.recipe(model_folder, prune=CUT, **changes), root
        self.work = session.Session(self.recipe, root, steps.variants(self.recipe)[:2])
        self.plan = {s.stage.name: s.stage for s in steps.steps(self.recipe, root)}

    def evaluate(self, variant: str) -> list[dict[str, Any]]:
        stage = self.plan[f"evaluate/{variant}"]
        doing.evaluate(self.work, stage)
        return json.loads((stage.path / "scores.json").read_text())

    def responses(self, variant: str, task: str) -> list[Any]:
        lines = (self.root / "evaluate" / variant / f"{task}.docs.jsonl").read_text().splitlines()
        return [json.loads(line)["responses"] for line in lines]


def fields(server: Server, **others: Any) -> dict[str, Any]:
    names = {"original": "whole", "pruned": "cut"}
    servers = {v: {"url": server.url, "model": m, "concurrency": 3, **others} for v, m in names.items()}
    return {"evaluate__engine": "endpoint", "evaluate__endpoint": servers}


def test_a_server_gives_the_scores_of_this_process(
    cut_run: Path, model_folder: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each variant from its own model; a fault that passes is tried again."""
    monkeypatch.setenv("SERVER_KEY", "secret")
    file = written(tmp_path / "a.jsonl", arc(9))
    asked = {
        "evaluate__tasks": ["arc_easy"],
        "evaluate__limit": 3,
        "evaluate__shots": 1,
        "evaluate__data": {"arc_easy": {"test": file}},
    }
    here = Run(cut_run, model_folder, tmp_path / "here", **asked)
    there = Run(cut_run, model_folder, tmp_path / "there", **asked, **fields(server, api_key_env="SERVER_KEY"))
    for variant in ("original", "pruned"):
        wanted, found = (run.evaluate(variant) for run in (here, there))
        for a, b in zip(wanted, found, strict=True):
            assert b.pop("setup") == a.pop("setup") | {"engine": "endpoint"}
            assert a == b
        for mine, theirs in zip(*(run.responses(variant, "arc_easy") for run in (here, there)), strict=True):
            assert theirs == pytest.approx(mine, abs=1e-3)
    assert server.keys == {"Bearer secret"} and not server.faults
    assert there.work._original is None  # no weights in this process
    one, other = (here.responses(v, "arc_easy")[0] for v in ("original", "pruned"))
    assert max(abs(a - b) for a, b in zip(one, other, strict=True)) > 0.01


def test_a_server_writes_what_this_process_writes(
    cut_run: Path, model_folder: Path, tmp_path: Path, server: Server
) -> None:
    server.faults.clear()
    file = written(tmp_path / "g.jsonl", tiny.problems(6))
    asked: dict[str, Any] = {"evaluate__tasks": ["gsm8k"], "evaluate__limit": 1, "evaluate__shots": 1}
    asked["evaluate__data"] = {"gsm8k": {"test": file}}
    here = Run(cut_run, model_folder, tmp_path / "here", **asked)
    there = Run(cut_run, model_folder, tmp_path / "there", **asked, **fields(server))
    assert [r["value"] for r in there.evaluate("pruned")] == [r["value"] for r in here.evaluate("pruned")]
    assert there.responses("pruned", "gsm8k") == here.responses("pruned", "gsm8k")


def test_a_server_of_another_model_is_refused_before_anything_is_asked(
    cut_run: Path, model_folder: Path, tmp_path: Path, server: Server
) -> None:
    wrong = fields(server)
    wrong["evaluate__endpoint"]["pruned"]["model"] = "uncut"
    run = Run(cut_run, model_folder, tmp_path / "run", **wrong)
    with pytest.raises(Refusal, match=r"evaluate\.endpoint\.pruned http.*/v1 serves cut, whole, not uncut; set evalu"):
        run.evaluate("original")
    assert not server.keys  # of /v1/completions
    server.shutdown()
    server.server_close()
    with pytest.raises(HfsdError, match=r"evaluate\.endpoint\.original .* lists no models .*; start its server"):
        Run(cut_run, model_folder, tmp_path / "down", **fields(server)).evaluate("original")


def test_where_a_server_is_does_not_change_the_key(cut_run: Path, model_folder: Path, tmp_path: Path) -> None:
    def key(url: str, model: str, batch_tokens: int = 99) -> str:
        server = {"url": url, "model": model}
        changes = {"evaluate__engine": "endpoint", "evaluate__endpoint": {"original": server}}
        run = Run(cut_run, model_folder, tmp_path / f"{url}{model}", **changes, evaluate__batch_tokens=batch_tokens)
        return run.plan["evaluate/original"].key

    assert key("a", "m") == key("b", "m", 17) != key("a", "n")


def test_vllm_is_given_each_variants_checkpoint(
    cut_run: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lm-eval's class of that name is given, with a stand-in for it that answers by transformers."""
    import lm_eval.models
    import tqdm
    from lm_eval.models.huggingface import HFLM

    given: list[dict[str, Any]] = []

    class VLLM(HFLM):
        def __init__(self, pretrained: str, dtype: str, **options: Any) -> None:
            given.append({"pretrained": pretrained, "dtype": dtype, **options})
            super().__init__(pretrained=pretrained, dtype="float32", device="cpu")

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with tqdm.tqdm(total=1) as bar:
                assert bar.format_dict["elapsed"] > 0  # vLLM divides by it; a silenced bar has no time
            return super().loglikelihood(requests, disable_tqdm)

    stand_in = types.ModuleType("lm_eval.models.vllm_causallms")
    stand_in.VLLM = VLLM  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(lm_eval.models, "vllm_causallms", stand_in, raising=False)
    file = written(tmp_path / "a.jsonl", arc(6))
    asked = {"evaluate__tasks": ["arc_easy"], "evaluate__data": {"arc_easy": {"test": file}}}
    here = Run(cut_run, model_folder, tmp_path / "here", **asked)
    there = Run(
        cut_run, model_folder, tmp_path / "there", **asked, evaluate__engine="vllm", evaluate__tensor_parallel=2
    )
    for variant in ("original", "pruned"):
        wanted, found = (run.evaluate(variant) for run in (here, there))
        assert [r["value"] for r in found] == [r["value"] for r in wanted] and found[0]["setup"]["engine"] == "vllm"
    folders = [str(model_folder), str(tmp_path / "there" / "prune" / "checkpoint")]
    others = {"dtype": "auto", "tensor_parallel_size": 2, "trust_remote_code": False, "seed": 0}
    assert given == [{"pretrained": folder, **others} for folder in folders]


def test_vllm_that_is_not_here_is_one_line(cut_run: Path, model_folder: Path, tmp_path: Path) -> None:
    if "vllm" in sys.modules:
        pytest.skip("vLLM is installed here")
    file = written(tmp_path / "a.jsonl", arc(3))
    asked = {"evaluate__tasks": ["arc_easy"], "evaluate__data": {"arc_easy": {"test": file}}}
    with pytest.raises(
        BadRequest, match=r"evaluate\.engine: vllm needs vLLM in this environment .* evaluate\.engine: endpoint"
    ):
        Run(cut_run, model_folder, tmp_path / "run", **asked, evaluate__engine="vllm").evaluate("original")
