"""A real vLLM server on the demo's model, in an environment of its own, whose Python $HFSD_VLLM names."""

from __future__ import annotations

import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from hfsd import data, drafts, engines, fetch, models, recipes
from hfsd.blocks import Endpoint
from hfsd.endpoint import Remote
from hfsd.engines import Request, Sampling
from hfsd.errors import Refusal

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]
NAME, ROWS = "smollm2-135m-instruct", 32
IN_PROCESS = """
import json, sys
from pathlib import Path
from hfsd.engines import Request, Sampling
from hfsd.blocks_cut import Model
from hfsd.vllm_engine import InProcess
if __name__ == "__main__":
    folder, asked = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    engine = InProcess(Path(folder), 1, Model(path=folder, dtype="float32"), enforce_eager=True, max_model_len=1024)
    long = Request("long", [{"role": "user", "content": "word " * 2000}])  # it would end the call for all rows
    *made, failed = engine.generate([*(Request(**r) for r in asked), long], Sampling(48), seed=0)
    assert failed.finish.endswith("tokens of prompt leave no room in the 1024 that the model reads"), failed
    *nats, none = engine.nats([*((r["messages"], c.text) for r, c in zip(asked, made)), (long.messages, "yes")])
    assert none is None
    Path(sys.argv[3]).write_text(json.dumps([[c.text, c.finish, n] for c, n in zip(made, nats)]))
"""


def _python() -> str:
    found = os.environ.get("HFSD_VLLM")
    if not found:
        pytest.skip("$HFSD_VLLM names no Python with vLLM")
    return found


@pytest.fixture(scope="module")
def folder() -> Path:
    return fetch.resolve(recipes.load("demo")[0].model).folder


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    recipe = recipes.load("demo")[0]
    rows = data.split(data.load(recipe.data[0]), recipe.data[0]).train[:ROWS]
    return [Request(row.id, drafts.messages(row, "math", "reference")) for row in rows]


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    python = _python()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--host", "127.0.0.1"]
    command += ["--port", str(port), "--served-model-name", NAME, "--dtype", "float32", "--enforce-eager"]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2"}
    env.pop("OMP_NUM_THREADS", None)
    log = tmp_path_factory.mktemp("vllm") / "server.log"
    with open(log, "w") as out:
        server = subprocess.Popen([*command, "--max-model-len", "1024"], stdout=out, stderr=subprocess.STDOUT, env=env)
        try:
            for _ in range(300):
                if server.poll() is not None:
                    pytest.fail(f"the server ended: {log.read_text()[-2000:]}")
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).read()
                    break
                except OSError:
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(30)


def test_the_endpoint_writes_what_transformers_writes(
    url: str, folder: Path, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)  # it forbids loopback too
    remote = Remote(Endpoint(url=url, model=NAME), str(folder))
    made = remote.generate(requests, Sampling(48), seed=0)
    own = engines.Transformers(models.load(folder), models.load_tokenizer(folder)).generate(
        requests, Sampling(48), seed=0
    )
    assert [c.id for c in made] == [r.id for r in requests]
    same = sum(a.text == b.text for a, b in zip(made, own, strict=True))
    assert same >= 0.9 * ROWS, f"{same} of {ROWS} rows are equal"
    with pytest.raises(Refusal, match=f"serves {NAME}, not another"):
        Remote(Endpoint(url=url, model="another"), str(folder)).generate(requests[:1], Sampling(4), seed=0)


def test_vllm_in_process_writes_and_scores_the_same(folder: Path, requests: list[Request], tmp_path: Path) -> None:
    import json

    asked, out = tmp_path / "asked.json", tmp_path / "made.json"
    asked.write_text(json.dumps([{"id": r.id, "messages": r.messages} for r in requests[:8]]))
    (tmp_path / "run.py").write_text(IN_PROCESS)
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "PYTHONPATH": str(Path(__file__).parents[1])}
    env.pop("OMP_NUM_THREADS", None)
    command = [_python(), str(tmp_path / "run.py"), str(folder), str(asked), str(out)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    engine = engines.Transformers(models.load(folder), models.load_tokenizer(folder))
    own = engine.generate(requests[:8], Sampling(48), seed=0)
    made = json.loads(out.read_text())
    assert sum(text == c.text for (text, _, _), c in zip(made, own, strict=True)) >= 7
    nats = engine.nats([(r.messages, text) for r, (text, _, _) in zip(requests, made, strict=False)])
    assert [n for *_, n in made] == pytest.approx(nats, rel=1e-3)
