"""Rewrite: the original answers every training row in its own words, with the reference as a guide.

All batches are planned from the rows up front. Each is one fsynced line of work/batches.jsonl, written whole: after a
kill, a torn last line is dropped and that batch is made again with the same rows and the same seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfsd import checks
from hfsd.engines import Completion, Engine, Request, Sampling
from hfsd.errors import BadRequest, HfsdError
from hfsd.progress import track
from hfsd.recipe import Rewrite as RewriteRecipe
from hfsd.records import Example, Rewrite, TrainSet, dumps
from hfsd.rundir import write_atomic

ARMS = ("sft", "self-distilled")


def run(engine: Callable[[], Engine], rows: Sequence[Example], recipe: RewriteRecipe, key: str, out: Path) -> TrainSet:
    """Rewrites the rows and writes the training set of both arms.

    Args:
        engine: makes the generator; not called where every batch is already there.
        key: the stage's key; a batch is seeded by it and by its own number.
        out: gets rewrites.jsonl (every row, input order), ARM.parquet (both arms, equal ids), stats.json.

    Raises:
        HfsdError: the engine failed; finished batches are kept.
    """
    start = time.perf_counter()
    if recipe.from_ is not None:
        done, name = _given(Path(recipe.from_), rows), f"from {Path(recipe.from_).name}"
    else:
        done, name = _generate(engine, rows, recipe, key, out), recipe.engine
    rewrites = [_judge(done[row.id], row, recipe.task) for row in rows]
    write_atomic(out / "rewrites.jsonl", "".join(json.dumps(asdict(r), ensure_ascii=False) + "\n" for r in rewrites))
    for arm in ARMS:
        _write_arm(arm, rows, rewrites, out / f"{arm}.parquet")
    kept = sum(r.kept for r in rewrites)
    stats = TrainSet(
        path=out.name,
        rows=len(rows),
        kept_fraction=kept / len(rows),
        reasons=dict(sorted(Counter(r.reason for r in rewrites).items())),
        n_tokens=sum(r.n_tokens for r in rewrites),
        seconds=round(time.perf_counter() - start, 3),
        engine=name,
        sampling={"temperature": recipe.temperature, "top_p": recipe.top_p, "max_new_tokens": recipe.max_new_tokens},
        reference_chars=sum(len(e.reference) for e in rows),
        rewrite_chars=sum(len(r.text) for r in rewrites),
    )
    write_atomic(out / "stats.json", dumps(stats))
    return stats


def requests(rows: Sequence[Example], task: str) -> list[Request]:
    """What the original is asked for each row: prompts.yaml's text with the row's prompt and reference in it."""
    texts = checks.prompts()[task]
    made = []
    for row in rows:
        # One pass, so that braces or placeholders inside a row's own text stay as they are.
        user = "".join({"{prompt}": row.prompt, "{reference}": row.reference}.get(p, p) for p in _pieces(texts["user"]))
        messages = [{"role": "system", "content": texts["system"]}, {"role": "user", "content": user}]
        made.append(Request(row.id, messages))
    return made


def read(folder: Path) -> list[tuple[Example, Rewrite]]:
    """The rows of a finished stage with their rewrites, in the order of the input."""
    import pyarrow.parquet as pq

    lines = (folder / "rewrites.jsonl").read_text(encoding="utf-8").split("\n")
    rewrites = [Rewrite(**json.loads(line)) for line in lines if line]
    rows = pq.read_table(folder / "sft.parquet").to_pylist()
    examples = [Example(r["id"], r["prompt"][0]["content"], r["completion"][0]["content"]) for r in rows]
    return list(zip(examples, rewrites, strict=True))


def _pieces(template: str) -> list[str]:
    return re.split(r"(\{prompt\}|\{reference\})", template)


def plan_batches(rows: Sequence[Example], size: int) -> list[list[int]]:
    """Row numbers per batch, rows of like length together so that little is padded; a function of the rows alone."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt) + 2 * len(rows[i].reference), rows[i].id))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _generate(
    engine: Callable[[], Engine], rows: Sequence[Example], recipe: RewriteRecipe, key: str, out: Path
) -> dict[str, Completion]:
    plan = plan_batches(rows, recipe.batch_rows)
    asked = requests(rows, recipe.task)
    log = out / "work" / "batches.jsonl"
    done = _finished_batches(log, plan, rows)
    sampling = Sampling(recipe.max_new_tokens, recipe.temperature, recipe.top_p)
    completions = {c.id: c for batch in done.values() for c in batch}
    references = {row.id: row.reference for row in rows}
    generator: Engine | None = None
    with track("rewrite", len(rows), "rows") as advance:
        advance(len(completions), note=_note(completions, references, recipe.task))
        for number, members in enumerate(plan):
            if number in done:
                continue
            generator = generator or engine()
            made = generator.generate([asked[i] for i in members], sampling, _seed(key, recipe.seed, number))
            _append(log, {"batch": number, "completions": [asdict(c) for c in made]})
            completions |= {c.id: c for c in made}
            advance(len(members), note=_note(completions, references, recipe.task))
    return completions


def _note(completions: dict[str, Completion], references: dict[str, str], task: str) -> str:
    if not completions:
        return ""
    verdicts = [checks.verdict(c.text, references[c.id], c.finish, task) for c in completions.values()]
    return f"{verdicts.count(checks.KEPT) / len(verdicts):.0%} accepted"


def _seed(key: str, seed: int, batch: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{key} {seed} {batch}".encode()).digest()[:4], "big")


def _append(path: Path, record: dict[str, Any]) -> None:
    """One line, on the disk before the next batch begins."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as handle:
            handle.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
    except OSError as error:
        raise HfsdError(
            f"cannot write {path}: {error.strerror}; free some space and run again, finished batches are kept"
        ) from error


def _finished_batches(path: Path, plan: list[list[int]], rows: Sequence[Example]) -> dict[int, list[Completion]]:
    """Batches that are whole in the log. A torn last line is cut off, so that the next starts on a line of its own."""
    if not path.is_file():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    done = {}
    for line in whole.decode("utf-8").split("\n"):
        if line:
            record = json.loads(line)
            made = [Completion(**c) for c in record["completions"]]
            if [c.id for c in made] != [rows[i].id for i in plan[record["batch"]]]:
                raise HfsdError(f"{path}: batch {record['batch']} is of other rows; make it again with --redo rewrite")
            done[record["batch"]] = made
    return done


def _given(path: Path, rows: Sequence[Example]) -> dict[str, Completion]:
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
    return {row.id: Completion(row.id, texts[row.id], 0, "stop") for row in rows}


def _judge(made: Completion, row: Example, task: str) -> Rewrite:
    reason = checks.verdict(made.text, row.reference, made.finish, task)
    return Rewrite(row.id, made.text, reason == checks.KEPT, reason, made.n_tokens, made.finish)


def _write_arm(arm: str, rows: Sequence[Example], rewrites: Sequence[Rewrite], path: Path) -> None:
    """One arm's rows in TRL's conversational prompt/completion form, as parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = []
    for row, made in zip(rows, rewrites, strict=True):
        text = (
            checks.with_final_line(made.text, row.reference) if arm == "self-distilled" and made.kept else row.reference
        )
        table.append(
            {
                "id": row.id,
                "prompt": [{"role": "user", "content": row.prompt}],
                "completion": [{"role": "assistant", "content": text}],
                "rewritten": arm == "self-distilled" and made.kept,
                "reason": made.reason,
            }
        )
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.Table.from_pylist(table), temporary)
    os.replace(temporary, path)
