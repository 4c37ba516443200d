"""The arms that learn from the original, on the real model of the demo run."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfsd import fetch, models, recipes, train
from hfsd.blocks_recovery import Train
from hfsd.plain import load
from hfsd.records import CONFIGS, Checkpoint, Variant

ROOT = Path(__file__).parents[1] / "runs" / "demo"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        not (ROOT / "rewrite" / "DONE.json").is_file(), reason="needs a finished `hfsd run demo` in the checkout"
    ),
]


@pytest.mark.parametrize("arm", ["sdd+kd", "on-policy"])
def test_arms_that_learn_from_the_original(arm: str, tmp_path: Path) -> None:
    import torch

    torch.set_num_threads(2)
    cut = load(Checkpoint, ROOT / "prune" / "prune.json")
    asked = Train(
        sft={"per_device_train_batch_size": 4, "max_steps": 3, "learning_rate": 3e-4},
        on_policy={"max_completion_length": 48},
    )
    source = fetch.resolve(recipes.load("demo")[0].model).folder
    data = {text: ROOT / "rewrite" / f"{text}.parquet" for text in CONFIGS}
    base, out = ROOT / "prune" / cut.path, tmp_path / f"{arm}-d"
    pruned = train.Pruned(base, cut.plan, cut.sha256)
    made = train.run(pruned, data, Variant(arm, "d"), asked, out, lambda: models.load(source))
    losses = [v for _, v in made.losses]
    print(arm, losses, made.tokens, made.seconds)
    assert made.steps == 3 and len(losses) == 3 and all(0 < v < 5 for v in losses)
    assert losses[-1] < losses[0]
    merged = models.load(out / "merged")
    assert models.count_params(merged) == cut.params
