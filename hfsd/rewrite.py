"""Rewrite: the original answers every training row in its own words; each answer is accepted or not, with a reason."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from hfsd import chat, checks, figures
from hfsd.answers import with_final_line
from hfsd.checks import Draft
from hfsd.drafts import Drafts, messages
from hfsd.engines import Engine
from hfsd.errors import BadRequest
from hfsd.recipe import Rewrite as RewriteRecipe
from hfsd.records import CONFIGS, Example, Message, Rewrite, TrainSet, dumps
from hfsd.rundir import write_atomic


def run(
    engine: Callable[[], Engine],
    rows: Sequence[Example],
    spare: Sequence[Example],
    recipe: RewriteRecipe,
    key: str,
    out: Path,
) -> TrainSet:
    """Rewrites the rows and writes the training set of both arms.

    Args:
        engine: makes the generator; not called where every batch is already there.
        spare: rows that are not trained on, for the worked rewrites of few-shot prompts.
        key: the stage's key; a batch is seeded by it and by its own place.
        out: gets rewrites.jsonl (every row, input order), one parquet file per arm (equal ids), stats.json, shift.png.

    Raises:
        BadRequest: no row is left (on_reject: drop), or the rewrites given do not fit.
        HfsdError: the engine failed; finished batches are kept.
    """
    start = time.perf_counter()
    if recipe.from_ is not None:
        name, pairs, n_tokens = f"from {Path(recipe.from_).name}", _given(Path(recipe.from_), rows, recipe), 0
    else:
        drafts = Drafts(engine, recipe, key, out / "work" / "batches.jsonl", _similarity(recipe))
        drafts.make(rows, spare)
        name = recipe.engine
        n_tokens = sum(d.n_tokens for made in drafts.judged.values() for d, _ in made)
        pairs = [(row, _judged(*drafts.chosen(row), drafts.reference_nats[row.id])) for row in rows]
    used = [pair for pair in pairs if pair[1].kept or recipe.on_reject == "reference"]
    if not used:
        raise BadRequest(f"rewrite: none of {len(rows)} rewrites was accepted and on_reject is drop: no row is left")
    lines = [{**asdict(rewrite), "example": asdict(row)} for row, rewrite in pairs]
    write_atomic(out / "rewrites.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for arm, config in CONFIGS.items():
        _write_arm(arm, used, out / f"{config}.parquet")
    stats = _stats(out, name, pairs, recipe, n_tokens, time.perf_counter() - start)
    write_atomic(out / "stats.json", dumps(stats))
    figures.draw_rewrites(pairs, out)
    return stats


def read(folder: Path) -> list[tuple[Example, Rewrite]]:
    """The rows of a finished stage with their rewrites, in the order of the input."""
    found = []
    for line in (folder / "rewrites.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        fields = json.loads(line)
        example = fields.pop("example")
        found.append((Example(**example | {"history": tuple(example["history"])}), Rewrite(**fields)))
    return found


def _similarity(recipe: RewriteRecipe) -> Callable[[str, str], float]:
    if recipe.similarity_model is None:
        return checks.overlap
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise BadRequest(
            "rewrite.similarity_model needs sentence-transformers: pip install sentence-transformers; "
            "without a model, similarity is the overlap of words"
        ) from None
    model = SentenceTransformer(recipe.similarity_model)

    def similarity(text: str, reference: str) -> float:
        one, other = model.encode([text, reference], normalize_embeddings=True, show_progress_bar=False)
        return max(0.0, float(one @ other))

    return similarity


def _judged(draft: Draft, reason: str, reference_nats: float | None) -> Rewrite:
    fields = asdict(draft)
    return Rewrite(**fields, kept=reason == checks.KEPT, reason=reason, reference_nats=reference_nats)


def _given(path: Path, rows: Sequence[Example], recipe: RewriteRecipe) -> list[tuple[Example, Rewrite]]:
    """Rewrites that the user already has, one per row, matched by id."""
    try:
        given = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        texts = {str(g["id"]): str(g["text"]) for g in given}
    except OSError as error:
        raise BadRequest(f"rewrite.from: cannot read {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        raise BadRequest(f"rewrite.from: {path} must hold one JSON object with id and text per line") from None
    if absent := [row.id for row in rows if row.id not in texts]:
        raise BadRequest(
            f"rewrite.from: {path} has no rewrite of {len(absent)} of {len(rows)} rows, such as {absent[0]}"
        )
    similarity = _similarity(recipe)
    found = []
    for row in rows:
        text = texts[row.id]
        draft = Draft(row.id, text, 0, "stop", "given", None, round(similarity(text, row.reference), 4))
        found.append((row, _judged(draft, checks.verdict(draft, row, None, recipe), None)))
    return found


def _stats(
    out: Path,
    engine: str,
    pairs: Sequence[tuple[Example, Rewrite]],
    recipe: RewriteRecipe,
    n_tokens: int,
    seconds: float,
) -> TrainSet:
    """Counts over all rows; lengths over all rewrites; likelihoods over the rows where both are measured."""
    rewrites = [r for _, r in pairs]
    both = [(r.reference_nats, r.nats) for r in rewrites if r.reference_nats is not None and r.nats is not None]
    return TrainSet(
        path=out.name,
        rows=len(rewrites),
        kept_fraction=fmean(r.kept for r in rewrites),
        reasons=dict(sorted(Counter(r.reason for r in rewrites).items())),
        n_tokens=n_tokens,
        seconds=round(seconds, 3),
        engine=engine,
        sampling={"temperature": recipe.temperature, "top_p": recipe.top_p, "max_new_tokens": recipe.max_new_tokens},
        reference_chars=sum(len(e.reference) for e, _ in pairs),
        rewrite_chars=sum(len(r.text) for r in rewrites),
        mode=recipe.how if recipe.from_ is None else "given",
        modes=dict(sorted(Counter(r.mode for r in rewrites if r.kept).items())),
        on_reject=recipe.on_reject,
        asked=_asked(recipe),
        reference_nats=fmean(a for a, _ in both) if both else None,
        rewrite_nats=fmean(b for _, b in both) if both else None,
        similarity=fmean(r.similarity for r in rewrites),
    )


def _asked(recipe: RewriteRecipe) -> tuple[Message, ...]:
    """The guided prompt of this task with its places open; none where rewrites were given or no reference is shown."""
    if recipe.from_ is not None or recipe.how == "self":
        return ()
    return tuple(messages(Example("", "{prompt}", "{reference}"), recipe.task, "reference"))


def _write_arm(arm: str, pairs: Sequence[tuple[Example, Rewrite]], path: Path) -> None:
    """One arm's rows in TRL's conversational prompt/completion form, as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: list[dict[str, Any]] = []
    for row, made in pairs:
        own = arm == "self-distilled" and made.kept
        text = with_final_line(made.text, row.reference) if own else row.reference
        table.append(
            {
                "id": row.id,
                "prompt": chat.asked(row),
                "completion": [{"role": "assistant", "content": text}],
                "rewritten": own,
                "reason": made.reason,
            }
        )
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(table), temporary)
    os.replace(temporary, path)
