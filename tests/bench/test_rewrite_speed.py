"""Rewriting against the engine's bare batch call on the same prompts, and what likelihoods cost on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hfsd import chat, data, drafts, models, recipes
from hfsd.engines import Answered, Request, Sampling, Transformers
from hfsd.recipe import Rewrite
from tests.bench.conftest import Table, in_turn

pytestmark = pytest.mark.bench
ROWS, TOKENS = 64, 64


class Unscored(Transformers):
    """Generates and tells no likelihoods, as an endpoint does."""

    def nats(self, answers: Sequence[Answered]) -> list[float | None]:
        return [None] * len(answers)


@pytest.mark.timeout(1800)
def test_rewriting_costs_little_more_than_generating(demo_folder: Path, tmp_path: Path, table: Table) -> None:
    loaded = models.load(demo_folder), models.load_tokenizer(demo_folder)
    engine, unscored = Transformers(*loaded), Unscored(*loaded)
    source = recipes.load("demo")[0].data[0]
    rows = data.split(data.load(source), source.model_copy(update={"rows": ROWS})).train
    asked = Rewrite(task="math", mode="reference", max_new_tokens=TOKENS, batch_rows=32)
    requests = [Request(row.id, drafts.messages(row, "math", "reference")) for row in rows]
    generated: dict[str, int] = {}
    read = [0]
    times = iter(range(99))

    def bare() -> None:
        made = [
            completion
            for batch in drafts.plan_batches(rows, asked.batch_rows)
            for completion in engine.generate([requests[i] for i in batch], Sampling(TOKENS), seed=0)
        ]
        generated["bare"] = sum(c.n_tokens for c in made)

    def rewritten(name: str, by: Transformers) -> None:
        made = drafts.Drafts(lambda: by, asked, "key", tmp_path / f"{next(times)}.jsonl", drafts.overlaps)
        made.make(rows, [])
        generated[name] = sum(draft.n_tokens for judged in made.judged.values() for draft, _ in judged)
        answers = [(row, text) for row in rows for text in (made.judged[row.id][0][0].text, row.reference)]
        read[0] = sum(sum(map(len, chat.answer_ids(engine.tokenizer, chat.asked(row), t))) for row, t in answers)

    seconds = in_turn(
        2,
        bare=bare,
        rewriting=lambda: rewritten("rewriting", unscored),
        scored=lambda: rewritten("scored", engine),
    )
    assert len(set(generated.values())) == 1  # the same work
    shown: list[tuple[object, ...]] = [("what", "seconds", "tokens/s")]
    shown += [(name, f"{s:.1f}", f"{generated[name] / s:.0f}") for name, s in seconds.items()]
    more, ratio = seconds["scored"] - seconds["rewriting"], seconds["bare"] / seconds["rewriting"]
    shown.append(("likelihoods on top (tokens read)", f"{more:.1f}", f"{read[0] / more:.0f}"))
    shown.append(("bare over rewriting", f"{ratio:.3f} x", ""))
    table(f"rewriting {len(rows)} rows of at most {TOKENS} new tokens, SmolLM2-135M, float32", shown)
    assert ratio >= 0.95
