"""Block scores against a plain computation from hidden states, and the choice of the cut."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hfsd import models, scan
from hfsd.errors import BadRequest, HfsdError
from hfsd.recipe import Scan as ScanRecipe
from hfsd.records import Example, ModelRef
from tests import tiny

ROWS = [Example(f"r{i}", p["question"], p["answer"]) for i, p in enumerate(tiny.problems(9))]
ASKED = ScanRecipe(rows=6, verify_rows=3, max_length=256, batch_tokens=600, candidates=2)


def _streams(model, ids):
    """The stream entering each block and the one before the final norm, by running the blocks one after another."""
    import torch

    taken = []
    hooks = [
        b.register_forward_pre_hook(lambda m, a, k: taken.append(a[0]), with_kwargs=True) for b in model.model.layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, a: taken.append(a[0])))
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return taken


@pytest.mark.parametrize("choice", ["all", "last"])
def test_scores_equal_a_plain_computation(model_folder: Path, choice: str) -> None:
    import torch

    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    got = scan.score(model, scan.batches(tokenizer, ROWS[:6], ASKED, model.device), 6, "angular")[choice]
    sums, count = torch.zeros(7, 7, dtype=torch.float64), 0
    for row in ROWS[:6]:  # one at a time, no padding
        ids, text = scan._encode(tokenizer, row, 256)
        streams = _streams(model, torch.tensor([ids]))
        picked = [i for i, t in enumerate(text) if t]
        decoded = tokenizer.decode([ids[i] for i in picked])
        assert decoded == row.prompt + row.reference  # text tokens, and only they
        picked = picked if choice == "all" else picked[-1:]
        for a in range(7):
            for b in range(7):
                cos = torch.nn.functional.cosine_similarity(streams[a][0, picked], streams[b][0, picked]).double()
                sums[a, b] += (cos.clamp(-1, 1).arccos() / math.pi).sum()
        count += len(picked)
    assert got.n_tokens == count and got.samples == 6
    for width in range(1, 6):
        expected = [(sums[s, s + width] / count).item() for s in range(7 - width)]
        assert got.values[width] == pytest.approx(expected, abs=2e-5)


def test_block_influence_sums_over_the_range(model_folder: Path) -> None:
    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    got = scan.score(model, scan.batches(tokenizer, ROWS[:4], ASKED, model.device), 4, "bi")["all"].values
    assert got[3][1] == pytest.approx(got[1][1] + got[1][2] + got[1][3])


def test_verified_takes_the_candidate_with_the_least_loss(model_folder: Path) -> None:
    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    found = scan.run(model, tokenizer, ROWS, ASKED, 2, ModelRef("m"))
    best = min(found.candidates, key=lambda c: c.loss)
    assert found.plan.removed == (best.start, best.start + 1)
    assert "deepest but the last" in {name for c in found.candidates for name in c.proposed_by.split(", ")}
    lowest = scan.run(
        model, tokenizer, ROWS, ASKED.model_copy(update={"select": "lowest", "tokens": "last"}), 2, ModelRef("m")
    )
    values = lowest.scores["last"].values[2]
    assert lowest.plan.removed[0] == values.index(min(values)) and lowest.candidates == []


def test_bad_input(model_folder: Path) -> None:
    import torch

    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    with pytest.raises(BadRequest, match="prune.blocks is 6; this model has 6 blocks, so 1 to 5 can go"):
        scan.run(model, tokenizer, ROWS, ASKED, 6, ModelRef("m"))
    with pytest.raises(BadRequest, match="3 calibration rows, and scan.verify_rows takes 3"):
        scan.run(model, tokenizer, ROWS[:3], ASKED, 2, ModelRef("m"))
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(HfsdError, match="a hidden state is NaN, infinite or zero"):
        scan.run(model, tokenizer, ROWS, ASKED, 2, ModelRef("m"))
