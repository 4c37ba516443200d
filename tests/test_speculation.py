"""Draft use: the formula agrees with a simulation, a model drafts perfectly for itself, and what cannot is told."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import models, speculation
from tests import architectures, tiny


@given(st.floats(0, 0.999), st.integers(1, 8))
def test_the_expected_length_is_that_of_the_paper(acceptance: float, gamma: int) -> None:
    expected = (1 - acceptance ** (gamma + 1)) / (1 - acceptance)
    assert speculation.tokens_per_pass(acceptance, gamma) == pytest.approx(expected)


@pytest.mark.parametrize(("acceptance", "gamma"), [(0.0, 3), (0.6, 1), (0.8, 4), (0.95, 8), (1.0, 5)])
def test_a_simulation_agrees(acceptance: float, gamma: int) -> None:
    draw, passes, made = random.Random(1), 20_000, 0
    for _ in range(passes):
        taken = next((i for i in range(gamma) if draw.random() >= acceptance), gamma)
        made += taken + 1  # and the original's own token behind them
    assert speculation.tokens_per_pass(acceptance, gamma) == pytest.approx(made / passes, rel=0.02)


def test_the_gamma_that_pays_best() -> None:
    assert speculation.best_gamma(1.0, 0.01) == 8 and speculation.best_gamma(0.5, 0.9) == 1
    for acceptance, cost in ((0.9, 0.1), (0.8, 0.3), (0.7, 0.05)):
        gains = {g: speculation.tokens_per_pass(acceptance, g) / (g * cost + 1) for g in range(1, 9)}
        assert gains[speculation.best_gamma(acceptance, cost)] == max(gains.values())


def test_a_model_that_drafts_for_itself_is_always_taken(model_folder: Path) -> None:
    original, draft = models.load(model_folder), models.load(model_folder)
    original.generation_config.eos_token_id = None
    passes = []
    original.register_forward_hook(lambda *_: passes.append(1))
    prompts = [(list(range(20, 30)), 16), (list(range(40, 45)), 8)]
    found = speculation.measure(original, draft, prompts, gamma=3)
    warm_up, plain, assisted = 1, 16 + 8, 4 + 2  # three drafted and one of its own per pass
    assert len(passes) == warm_up + plain + assisted
    assert found.value and 0 < found.value.low <= found.value.value <= found.value.high  # type: ignore[operator]
    assert "2 prompts, 24 tokens, gamma 3" in found.said and "texts equal" in found.said


def test_generation_configs_change_nothing(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original, draft = models.load(model_folder), models.load(model_folder)
    real, made = type(original).generate, []

    def generate(self, **options):
        out = real(self, **options)
        if self is original:
            made.append(out[0].tolist())
        return out

    monkeypatch.setattr(type(original), "generate", generate)
    prompts = [(list(range(20, 30)), 12)]
    speculation.measure(original, draft, prompts, gamma=2)
    plain = made.copy()
    for model in (original, draft):
        model.generation_config.repetition_penalty, model.generation_config.suppress_tokens = 3.0, plain[-1][-3:]
    held = original.generation_config
    speculation.measure(original, draft, prompts, gamma=2)
    assert made[len(plain) :] == plain and original.generation_config is held


def test_texts_that_differ_are_counted_and_no_cause_is_made_up(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = {False: speculation._Run([1, 2], 1.0), True: speculation._Run([1, 3], 0.5)}
    monkeypatch.setattr(speculation, "_timed", lambda original, asked, draft=None: runs[draft is not None])
    model = models.load(model_folder)
    assert speculation.measure(model, model, [([5], 2)] * 3, 2).said.endswith("; 3 of 3 texts differ")


def test_another_draft_changes_no_text(model_folder: Path, tmp_path: Path) -> None:
    original, draft = models.load(model_folder), models.load(tiny.llama(tmp_path / "other", seed=5))
    found = speculation.measure(original, draft, [(list(range(20, 30)), 12)], gamma=2)
    assert found.value and found.value.low == found.value.value == found.value.high and "texts equal" in found.said


def test_a_cache_that_cannot_be_rolled_back_is_told(tmp_path: Path) -> None:
    (row,) = (r for r in architectures.TABLE if r.label == "Qwen3-Next")
    model = models.load(architectures.build(row, tmp_path / "model"))
    found = speculation.measure(model, model, [([5, 6, 7], 4)], gamma=2)
    assert found.value is None
    assert found.said.startswith("no speed-up measured: assisted generation is not supported with stateful models")
