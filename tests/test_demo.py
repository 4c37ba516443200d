"""The real demo run, finished by `hfsd run demo` in this checkout: what it promises holds on the real model."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from hfsd import cards, fetch, models, pipeline
from hfsd.family import Family
from hfsd.findings import Results
from hfsd.plain import load

ROOT = Path(__file__).parents[1] / "runs" / "demo"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (ROOT / "publish" / "DONE.json").is_file(), reason="needs a finished `hfsd run demo` in the checkout"
    ),
]
ARM = "self-distilled-gsm-symbolic"


@pytest.fixture(scope="module")
def results() -> Results:
    return load(Results, ROOT / "report" / "results.json")


def test_four_variants_on_three_tasks_with_two_that_count(results: Results) -> None:
    assert [v.variant.arm for v in results.variants] == ["original", "pruned", "sft", "self-distilled"]
    tasks = {t.task: t for t in results.tasks}
    assert set(tasks) == {"demo_match", "demo_rank", "demo_bpb"}
    for name in ("demo_match", "demo_rank"):
        original = tasks[name].scores["original"]
        clear = original.value >= tasks[name].chance + 0.1 and original.low > tasks[name].chance
        assert tasks[name].in_mean == clear and tasks[name].n == 24 and tasks[name].chance == 0.25
    assert not tasks["demo_bpb"].in_mean
    assert (results.plan.n_layers, len(results.plan.removed)) == (30, 4)
    assert results.variants[0].params == 134_515_008 and results.variants[1].params < 121_000_000


def test_the_verified_cut_is_the_best_of_its_candidates(results: Results) -> None:
    assert results.scan is not None
    best = min(results.scan.candidates, key=lambda c: c.loss)
    assert results.plan.removed == best.removed


def test_training_lowers_the_loss_and_both_arms_share_everything(results: Results) -> None:
    first, second = results.training
    assert first.fairness == second.fairness and first.steps == second.steps
    for report in results.training:
        values = [v for _, v in report.losses]
        assert sum(values[-3:]) < sum(values[:3])


def test_the_demo_takes_less_than_20_minutes(results: Results) -> None:
    seconds = sum(load_seconds().values())
    print("\n".join(f"{name:<42} {s:7.1f} s" for name, s in load_seconds().items()), f"\ntotal {seconds:.0f} s")
    assert seconds < 20 * 60


def load_seconds() -> dict[str, float]:
    return {
        m.parent.relative_to(ROOT).as_posix(): json.loads(m.read_text())["seconds"] for m in ROOT.rglob("DONE.json")
    }


def test_the_merged_checkpoint_and_the_shared_family_agree() -> None:
    import torch

    merged = models.load(ROOT / "train" / ARM / "merged")
    recipe = pipeline.recipes.load("demo")[0]
    original = models.load(fetch.resolve(recipe.model).folder)
    kept = load(Results, ROOT / "report" / "results.json").plan.kept
    family = Family(original, kept, {ARM: ROOT / "train" / ARM / "adapter"})
    ids = torch.arange(100, 140)[None]
    with torch.inference_mode(), family.use(ARM) as arm:
        assert torch.allclose(arm(ids).logits, merged(ids).logits, atol=1e-3)


def test_every_card_is_valid_and_every_repo_loads() -> None:
    from transformers import AutoConfig, AutoTokenizer

    folders = [p for p in (ROOT / "publish").iterdir() if p.is_dir()]
    assert len(folders) == 6
    for folder in folders:
        assert cards.validate((folder / "README.md").read_text()) == []
        if (folder / "config.json").is_file():
            assert AutoConfig.from_pretrained(folder).num_hidden_layers in (26, 30)
            assert AutoTokenizer.from_pretrained(folder).chat_template


def test_pictures_and_report_are_there() -> None:
    for name in ("block_scores.png", "recovery.png", "candidates.png", "loss.png"):
        assert (ROOT / "report" / name).stat().st_size > 10_000
    assert "## " in (ROOT / "report" / "report.md").read_text()


def test_a_second_run_does_nothing_in_no_time() -> None:
    start = time.perf_counter()
    pipeline.run("demo", out=ROOT)
    assert time.perf_counter() - start < 2
