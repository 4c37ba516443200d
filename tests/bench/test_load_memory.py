"""Memory of a whole family as `load_family` gives it, and what the check of the shared weights costs."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from hfsd import familyfile, models, surgery
from hfsd.familyfile import FamilyFile, Place
from hfsd.plain import dumps
from hfsd.rundir import link_or_copy
from tests.bench.conftest import Table, peak

pytestmark = pytest.mark.bench
ARMS = ("sft", "self-distilled")

MEMORY = """
import sys
from pathlib import Path
def prepare():
    import peft, torch, transformers
    import hfsd.loading
    from transformers import AutoModelForCausalLM
def work():
    import torch
    from hfsd import loading, models
    ids = torch.arange(1, 65)[None]
    with torch.inference_mode():
        if sys.argv[2] == "original":
            models.load(Path(sys.argv[1]))(ids)
            return
        family = loading.load_family(sys.argv[1])
        for variant in family.ids:
            with family.use(variant) as model:
                model(ids)
"""


def test_a_family_takes_the_memory_of_the_original_and_the_adapters(
    demo_folder: Path, tmp_path: Path, table: Table
) -> None:
    from peft import LoraConfig, get_peft_model

    original = models.load(demo_folder, "float32")
    n_layers = original.config.num_hidden_layers
    kept = tuple(i for i in range(n_layers) if not 12 <= i < 16)
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    for arm in ARMS:
        get_peft_model(surgery.view(original, kept), config).save_pretrained(tmp_path / arm)
    del original
    shutil.copytree(demo_folder, tmp_path / "original", copy_function=lambda a, b: link_or_copy(Path(a), Path(b)))
    start = time.perf_counter()
    shared = familyfile.fingerprints(demo_folder, n_layers, kept)
    hashing = time.perf_counter() - start
    file = FamilyFile(
        name="bench",
        title="",
        n_layers=n_layers,
        kept=kept,
        original=Place(path="../original"),
        adapters={arm: Place(path=f"../{arm}") for arm in ARMS},
        checkpoints={},
        params={},
        recovery={},
        sentence="",
        headline="",
        examples=[],
        repos={},
        max_new_tokens=1,
        shared=shared,
    )
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / familyfile.NAME).write_text(dumps(file), encoding="utf-8")
    alone = peak(MEMORY, str(demo_folder), "original")["above"]
    together = peak(MEMORY, str(tmp_path / "pruned"), "family")["above"]
    adapters = sum((tmp_path / arm / "adapter_model.safetensors").stat().st_size for arm in ARMS) / 1e6
    bound = 1.15 * alone + adapters
    shown: list[tuple[object, ...]] = [("variants in memory", "MB over the imports")]
    shown += [("original alone", f"{alone:.0f}"), ("original, pruned, two arms", f"{together:.0f}")]
    shown += [("adapters on disk", f"{adapters:.0f}"), ("1.15 x the original + adapters", f"{bound:.0f}")]
    table("load_family and a forward pass of each, SmolLM2-135M, float32", shown)
    table("hashing what is shared", [("seconds", f"{hashing:.2f}")])
    assert together <= bound
