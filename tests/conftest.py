"""What every test shares: no network but loopback, no telemetry, one thread, and one tiny run made once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before any import of the Hub's client, which reads these once.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import pytest

from tests import tiny


@pytest.fixture(scope="session", autouse=True)
def quick_costs() -> Iterator[None]:
    """One short turn of speed, and no new process per model, which takes seconds to import torch (see test_speed)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hfsd.speed.TURNS", 1)
        patch.setattr("hfsd.speed.NEW", 2)
        patch.setattr("hfsd.speed.peak_alone", lambda asked: (1 << 20, "peak: made up in tests"))
        yield


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 6 blocks with a byte-level tokenizer."""
    return tiny.llama(tmp_path_factory.mktemp("model") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_run(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of the tiny recipe, from scan to the staged repos. Read it, do not change it."""
    from hfsd import pipeline

    root = tmp_path_factory.mktemp("runs") / "tiny"
    return pipeline.run(tiny.recipe(model_folder), out=root)
