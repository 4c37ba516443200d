"""Verified selection against every cut there is, on the demo's model."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfsd import calibration, data, models, recipes, scan
from hfsd.blocks_cut import Scan
from hfsd.records import ModelRef
from hfsd.verify import Verifier
from tests.bench.conftest import Table

pytestmark = pytest.mark.bench
WIDTHS = (2, 4, 6, 8)


@pytest.mark.timeout(3600)
def test_verified_selection_is_near_the_best_cut(demo_folder: Path, table: Table) -> None:
    model, tokenizer = models.load(demo_folder), models.load_tokenizer(demo_folder)
    recipe = recipes.load("demo")[0]
    passages = data.passages(recipe.data[0])
    asked = Scan(rows=64, verify_rows=16)
    chosen = calibration.sequences(tokenizer, passages, asked.verify_rows, asked.max_length)
    held_out = list(calibration.batches(tokenizer, chosen, asked.batch_tokens, model.device))
    rows = [("blocks", "chosen", "loss", "best of all", "loss", "over best", "verified", "of")]
    over = {}
    for width in WIDTHS:
        found = scan.run(model, tokenizer, passages, asked, width, ModelRef("demo"))
        cuts = [tuple(range(s, s + width)) for s in range(30 - width + 1)]
        with Verifier(model, held_out) as verifier:
            losses = dict(zip(cuts, verifier.losses(cuts)[1], strict=True))
        best = min(cuts, key=losses.__getitem__)
        mine = found.plan.removed
        assert found.plan.scores["loss"] == pytest.approx(losses[mine], rel=1e-4)
        over[width] = losses[mine] / losses[best] - 1
        places = [f"[{c[0]}, {c[-1] + 1})" for c in (mine, best)]
        counts = (len(found.candidates), len(cuts))
        rows.append(
            (width, places[0], f"{losses[mine]:.4f}", places[1], f"{losses[best]:.4f}", f"{over[width]:.2%}", *counts)
        )
    table("verified selection against all cuts, SmolLM2-135M, word problems", rows)
    assert max(over.values()) <= 0.02
