"""Rewrite: the original answers every training row in its own words; each answer is accepted or not, with a reason."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from hfsd import chat, checks, figures
from hfsd.answers import with_final_line
from hfsd.blocks_recovery import Rewrite as RewriteRecipe
from hfsd.checks import Draft
from hfsd.drafts import Drafts, messages
from hfsd.engines import Engine
from hfsd.errors import BadRequest
from hfsd.likeness import similarity
from hfsd.markdown import without_paths
from hfsd.plain import dumps
from hfsd.records import CONFIGS, Example, Message, Rewrite, TrainSet
from hfsd.rundir import sha256, write_atomic

BY = ("engine", "model", "sampling")  # what every line of rewrites.jsonl says of how its text came about


def run(
    engine: Callable[[], Engine],
    rows: Sequence[Example],
    spare: Sequence[Example],
    recipe: RewriteRecipe,
    key: str,
    out: Path,
    model: str | None = None,
) -> TrainSet:
    """Rewrites the rows and writes the training set in both texts.

    Args:
        engine: makes the generator; not called where every batch is already there.
        spare: rows that are not trained on, for the worked rewrites of few-shot prompts.
        key: the stage's key; a batch is seeded by it and by its own place.
        out: gets rewrites.jsonl (every row, input order), one parquet file per text (equal ids), stats.json, shift.png.
        model: the original, as `repo@revision`, for every line of rewrites.jsonl; None: not said.

    Raises:
        BadRequest: no row is left (on_reject: drop), or the rewrites given do not fit.
        HfsdError: the engine failed, or the disk is full; finished batches are kept.
    """
    start = time.perf_counter()
    if recipe.from_ is not None:
        name, pairs, n_tokens = f"from {Path(recipe.from_).name}", _given(Path(recipe.from_), rows, recipe), 0
        seconds = time.perf_counter() - start
    else:
        measure = similarity(recipe.similarity_model, "rewrite")
        drafts = Drafts(engine, recipe, key, out / "work" / "batches.jsonl", measure)
        drafts.make(rows, spare)
        name, seconds = recipe.engine, drafts.seconds
        n_tokens = sum(d.n_tokens for made in drafts.judged.values() for d, _ in made)
        pairs = [(row, _judged(*drafts.chosen(row), drafts.reference_nats[row.id])) for row in rows]
    used = [pair for pair in pairs if pair[1].kept or recipe.on_reject == "reference"]
    if not used:
        raise BadRequest(f"rewrite: none of {len(rows)} rewrites was accepted and on_reject is drop: no row is left")
    by = dict(zip(BY, (name, _said(model, recipe), _sampling(recipe)), strict=True))
    lines = [{**asdict(rewrite), **by, "example": asdict(row)} for row, rewrite in pairs]
    write_atomic(out / "rewrites.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    for config in CONFIGS:
        _write_text(config, used, out / f"{config}.parquet")
    stats = _stats(out, name, pairs, recipe, n_tokens, seconds)
    write_atomic(out / "stats.json", dumps(stats))
    figures.draw_rewrites(pairs, out)
    return stats


def read(folder: Path) -> list[tuple[Example, Rewrite]]:
    """The rows of a finished stage with their rewrites, in the order of the input."""
    found = []
    for line in (folder / "rewrites.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        fields = json.loads(line)
        example = fields.pop("example")
        made = Rewrite(**{k: v for k, v in fields.items() if k not in BY})
        found.append((Example(**example | {"history": tuple(example["history"])}), made))
    return found


def inputs(recipe: RewriteRecipe) -> dict[str, str]:
    """sha256 of what rewrites depend on beside the recipe's fields: the prompts in use, and rewrites that are given.

    What is not there, or has another shape, is left out: `faults` tells it.
    """
    checks.prompts.cache_clear()  # an own file may have changed since another run of this process
    found = {}
    if not faults(recipe):
        found["prompts"] = hashlib.sha256(dumps(checks.prompts(recipe.prompts)).encode()).hexdigest()
    if recipe.from_ is not None and Path(recipe.from_).is_file():
        found["from"] = sha256(Path(recipe.from_))
    return found


def faults(recipe: RewriteRecipe) -> list[str]:
    """What is wrong with the prompts that the recipe names, in one line; empty if nothing is."""
    try:
        checks.prompts(recipe.prompts)
    except BadRequest as error:
        return [str(error)]
    return []


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
    measure = similarity(recipe.similarity_model, "rewrite")
    alike = measure([texts[row.id] for row in rows], [row.reference for row in rows])
    found = []
    for row, likeness in zip(rows, alike, strict=True):
        draft = Draft(row.id, texts[row.id], 0, "stop", "given", None, round(likeness, 4))
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
    before, after = sum(len(e.reference) for e, _ in pairs), sum(len(r.text) for r in rewrites)
    both = [(r.reference_nats, r.nats) for r in rewrites if r.reference_nats is not None and r.nats is not None]
    return TrainSet(
        path=out.name,
        rows=len(rewrites),
        kept_fraction=fmean(r.kept for r in rewrites),
        reasons=dict(sorted(Counter(r.reason for r in rewrites).items())),
        n_tokens=n_tokens,
        seconds=round(seconds, 3),
        engine=engine,
        sampling=_sampling(recipe),
        reference_chars=before,
        rewrite_chars=after,
        mode=recipe.how if recipe.from_ is None else "given",
        modes=dict(sorted(Counter(r.mode for r in rewrites if r.kept).items())),
        on_reject=recipe.on_reject,
        asked=_asked(recipe),
        reference_nats=fmean(a for a, _ in both) if both else None,
        rewrite_nats=fmean(b for _, b in both) if both else None,
        similarity=fmean(r.similarity for r in rewrites),
        used=sum(r.kept for r in rewrites) if recipe.on_reject == "drop" else len(rewrites),
        tokens_per_second=round(n_tokens / seconds, 3) if n_tokens and seconds else None,
        length_change=after / before - 1 if before else None,
    )


def _sampling(recipe: RewriteRecipe) -> dict[str, Any]:
    """How drafts are sampled; of rewrites that were given, that is not known."""
    if recipe.from_ is not None:
        return {}
    return {"temperature": recipe.temperature, "top_p": recipe.top_p, "max_new_tokens": recipe.max_new_tokens}


def _said(model: str | None, recipe: RewriteRecipe) -> str | None:
    """The model of a line: no folder of this machine, since lines are published; of given rewrites it is not known."""
    return None if model is None or recipe.from_ is not None else without_paths(model)


def _asked(recipe: RewriteRecipe) -> tuple[Message, ...]:
    """The guided prompt of this task with its places open; none where rewrites were given or no reference is shown."""
    if recipe.from_ is not None or recipe.how == "self":
        return ()
    open_row = Example("", "{prompt}", "{reference}")
    return tuple(messages(open_row, recipe.task, "reference", prompts=recipe.prompts))


def _write_text(config: str, pairs: Sequence[tuple[Example, Rewrite]], path: Path) -> None:
    """One text of the rows in TRL's conversational prompt/completion form, as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table: list[dict[str, Any]] = []
    for row, made in pairs:
        own = config == "self-distilled" and made.kept
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
    file = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(table), file)
    write_atomic(path, file.getvalue().to_pybytes())
