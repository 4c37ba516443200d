"""The shift from the original: zero for itself, equal to a plain computation, measured along the original's answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfsd import chat, compare, models
from hfsd.errors import BadRequest
from hfsd.family import Family
from hfsd.recipe import Compare
from hfsd.records import Example, Variant
from tests import tiny

PROMPTS = [Example(f"p{i}", p["question"], p["answer"]) for i, p in enumerate(tiny.problems(3))]
ASKED = Compare(prompts=3, max_new_tokens=6)


def _run(model_folder: Path, kept: tuple[int, ...], out: Path) -> tuple[Family, list]:
    tokenizer = models.load_tokenizer(model_folder)
    family = Family(models.load(model_folder), kept, {})
    return family, compare.run(family, tokenizer, PROMPTS, [Variant("original"), Variant("pruned")], ASKED, out)


def test_a_cut_of_nothing_has_not_moved(model_folder: Path, tmp_path: Path) -> None:
    _, (shift,) = _run(model_folder, tuple(range(6)), tmp_path)
    assert shift.kl == pytest.approx(0, abs=1e-6) and shift.top1 == 1.0 and shift.prompts == 3


def test_kl_equals_a_plain_computation(model_folder: Path, tmp_path: Path) -> None:
    import torch

    family, (shift,) = _run(model_folder, (0, 1, 4, 5), tmp_path)
    tokenizer = models.load_tokenizer(model_folder)
    _, answers = compare.read(tmp_path)
    assert [a.id for a in answers] == ["p0", "p1", "p2"] and set(answers[0].answers) == {"original", "pruned"}
    total, tokens = 0.0, 0
    for example, answer in zip(PROMPTS, answers, strict=True):
        text = chat.render(tokenizer, chat.asked(example)) + answer.answers["original"]
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        count = len(tokenizer(answer.answers["original"], add_special_tokens=False)["input_ids"])
        with torch.inference_mode():
            p, q = (
                m(ids).logits[0, -count - 1 : -1].double().log_softmax(-1) for m in (family.original, family.pruned)
            )
        total += torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item()
        tokens += count
    assert shift.n_tokens == tokens and shift.kl == pytest.approx(total / tokens, rel=1e-4) and shift.kl > 0


def test_finished_answers_are_not_made_again(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(model_folder, (0, 1, 4, 5), tmp_path)
    kept = (tmp_path / "answers.jsonl").read_bytes()
    monkeypatch.setattr(compare.Transformers, "generate", lambda *_: pytest.fail("generated again"))
    _run(model_folder, (0, 1, 4, 5), tmp_path)
    assert (tmp_path / "answers.jsonl").read_bytes() == kept
    for path in (tmp_path / "work").iterdir():
        assert set(json.loads(path.read_text())) == {"p0", "p1", "p2"}


def test_no_prompts(model_folder: Path, tmp_path: Path) -> None:
    family = Family(models.load(model_folder), (0, 1), {})
    with pytest.raises(BadRequest, match="no held-out prompt"):
        compare.run(family, models.load_tokenizer(model_folder), [], [Variant("original")], ASKED, tmp_path)
