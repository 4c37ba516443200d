"""Rewriting against the engine's bare batch call on the same prompts."""

from __future__ import annotations

from pathlib import Path

import pytest

from hfsd import checks, data, models, recipes
from hfsd.drafts import Drafts, messages, plan_batches
from hfsd.engines import Request, Sampling, Transformers
from hfsd.recipe import Rewrite
from tests.bench.conftest import Table, in_turn

pytestmark = pytest.mark.bench
ROWS, TOKENS = 64, 64


@pytest.mark.timeout(1800)
def test_rewriting_costs_little_more_than_generating(demo_folder: Path, tmp_path: Path, table: Table) -> None:
    engine = Transformers(models.load(demo_folder), models.load_tokenizer(demo_folder))
    recipe = recipes.load("demo")[0]
    rows = data.split(data.load(recipe.data), recipe.data.model_copy(update={"rows": ROWS})).train
    asked = Rewrite(task="math", max_new_tokens=TOKENS, batch_rows=32)
    requests = [Request(row.id, messages(row, "math", "reference")) for row in rows]
    generated = [0]
    times = iter(range(99))

    def bare() -> None:
        made = [
            completion
            for batch in plan_batches(rows, asked.batch_rows)
            for completion in engine.generate([requests[i] for i in batch], Sampling(TOKENS), seed=0)
        ]
        generated[0] = sum(c.n_tokens for c in made)

    def rewritten() -> None:
        log = tmp_path / f"{next(times)}.jsonl"
        Drafts(lambda: engine, asked, "key", log, checks.overlap).make(rows, [])

    seconds = in_turn(2, bare=bare, rewriting=rewritten)
    shown = [("what", "seconds", "tokens/s")]
    shown += [(name, f"{s:.1f}", f"{generated[0] / s:.0f}") for name, s in seconds.items()]
    ratio = seconds["bare"] / seconds["rewriting"]
    shown.append(("rewriting, likelihoods included, over bare", f"{ratio:.3f} x", ""))
    table(f"rewriting {len(rows)} rows of at most {TOKENS} new tokens, SmolLM2-135M, float32", shown)
    assert ratio >= 0.95
