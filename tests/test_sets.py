"""Several data sets and seeds in one run: a model of each, and the models of both sets merged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfsd import pipeline, recipes
from hfsd.plain import load
from hfsd.records import MergeReport, Variant
from tests import tiny

SEEDS = (0, 1)


@pytest.fixture(scope="module")
def root(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plain = recipes.dump(tiny.recipe(model_folder))
    sets = [{**plain["data"], "name": name, "seed": seed, "rows": 4} for name, seed in (("one", 0), ("two", 1))]
    merge = {"of": ["one", "two"], "t": [0.25, 0.75]}
    train = {**plain["train"], "arms": ["self-distilled"], "seeds": list(SEEDS)}
    asked = {**plain, "data": sets, "merge": merge, "train": train, "evaluate": {"tasks": ["demo"], "limit": 2}}
    return pipeline.run(recipes.validate(asked), out=tmp_path_factory.mktemp("sets") / "tiny")


def test_a_model_of_each_set_and_seed_and_their_merge(root: Path) -> None:
    found = pipeline.results(root)
    arms = [Variant("self-distilled", name, seed).id for name in ("one", "two") for seed in SEEDS]
    merged = [Variant("merged", "one-two", seed).id for seed in SEEDS]
    assert [v.variant.id for v in found.variants] == ["original", "pruned", *arms, *merged]
    assert sorted(found.train_sets) == ["one", "two"] and sorted(found.merges) == merged
    for name in ("one", "two"):
        assert (root / "rewrite" / name / "rewrites.jsonl").is_file()
    assert all(score.value >= 0 for task in found.tasks for score in task.scores.values())
    assert all(v.shift is not None and v.params == found.variants[1].params for v in found.variants[2:])


def test_the_merge_with_the_least_loss_is_kept(root: Path) -> None:
    for seed in SEEDS:
        folder = root / "merge" / f"merged-one-two-s{seed}"
        made = load(MergeReport, folder / "merge.json")
        losses = {m.t: m.loss for m in made.losses}
        assert set(losses) == {0.25, 0.75} and made.t == min(losses, key=losses.__getitem__)
        assert made.parts == (f"self-distilled-one-s{seed}", f"self-distilled-two-s{seed}")
        assert (folder / "merged" / "model.safetensors").is_file()


def test_every_set_is_published_in_one_data_set(root: Path) -> None:
    (folder,) = (root / "publish").glob("one-two-rewritten-by-*")
    files = sorted(p.name for p in folder.glob("*.parquet"))
    assert files == [f"{name}-{text}.parquet" for name in ("one", "two") for text in ("reference", "self-distilled")]
    card = (folder / "README.md").read_text()
    assert all(f"config_name: {name}-self-distilled" in card for name in ("one", "two"))
    (merged,) = (root / "publish").glob("*-merged-one-two-s0")
    assert "SLERP fell back to linear" in (merged / "README.md").read_text()
    spec = json.loads(next((root / "publish").glob("*/family.json")).read_text())
    assert sorted(spec["adapters"]) == [f"self-distilled-{n}-s{s}" for n in ("one", "two") for s in SEEDS]
