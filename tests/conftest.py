"""What every test shares: no network but loopback, no telemetry, one thread, and one tiny run made once."""

from __future__ import annotations

import os
from pathlib import Path

# Before any import of the Hub's client, which reads these once.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False"}
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}

import pytest

from tests import tiny


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
