"""Rewriting against the engine's bare batch call on the same prompts, and what likelihoods cost on top of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from hfsd import chat, data, drafts, likeness, models, recipes
from hfsd.blocks_recovery import Rewrite
from hfsd.engines import Answered, Request, Sampling, Transformers
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
        made = drafts.Drafts(lambda: by, asked, "key", tmp_path / f"{next(times)}.jsonl", likeness.overlaps)
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


@pytest.mark.timeout(1800)
def test_padded_batches_beside_continuous_batching(demo_folder: Path, table: Table) -> None:
    """Which of transformers' two ways to generate is the faster on this device: the engine uses padded batches."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model, tokenizer = models.load(demo_folder), models.load_tokenizer(demo_folder)
    engine = Transformers(model, tokenizer)
    source = recipes.load("demo")[0].data[0]
    rows = data.split(data.load(source), source.model_copy(update={"rows": ROWS})).train
    requests = [Request(row.id, drafts.messages(row, "math", "reference")) for row in rows]
    prompts = [tokenizer(chat.render(tokenizer, r.messages), add_special_tokens=False)["input_ids"] for r in requests]
    greedy = GenerationConfig(
        max_new_tokens=TOKENS,
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    found: dict[str, list[str]] = {}

    def padded() -> None:
        plan = drafts.plan_batches(rows, 32)
        made = {c.id: c for batch in plan for c in engine.generate([requests[i] for i in batch], Sampling(TOKENS), 0)}
        found["padded"] = [made[r.id].text for r in requests]
        found["tokens"] = [str(sum(c.n_tokens for c in made.values()))]

    def continuous(tokens: int) -> None:
        settings = ContinuousBatchingConfig(num_blocks=128, page_size=64, max_batch_tokens=tokens)
        made = model.generate_batch(prompts, generation_config=greedy, continuous_batching_config=settings)
        texts = [tokenizer.decode(made[k].generated_tokens, skip_special_tokens=True).strip() for k in made]
        found[f"continuous {tokens}"] = texts

    works = {f"continuous {n}": lambda n=n: continuous(n) for n in (64, 256)}
    seconds = in_turn(1, padded=padded, **works)
    tokens = int(found.pop("tokens")[0])
    shown: list[tuple[object, ...]] = [("what", "seconds", "tokens/s", "texts equal to padded")]
    for name, s in seconds.items():
        same = sum(text in found["padded"] for text in found[name])
        shown.append((name, f"{s:.1f}", f"{tokens / s:.0f}", f"{same} of {len(rows)}"))
    table(f"generating for {len(rows)} rows of at most {TOKENS} new tokens, SmolLM2-135M, float32", shown)
    assert seconds["padded"] <= min(s for name, s in seconds.items() if name != "padded")
