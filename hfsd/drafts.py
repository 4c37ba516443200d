"""Drafts of every row, batch by batch, losing nothing.

Which rows a batch holds and how it is seeded follow from the rows and the recipe alone. Each batch is one fsynced line
of a log, written whole: after a kill, a torn last line is dropped and that batch is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hfsd import chat, checks
from hfsd.blocks_recovery import Rewrite as RewriteRecipe
from hfsd.checks import Draft
from hfsd.engines import Batch, Completion, Engine, Request, Sampling
from hfsd.errors import BadRequest, HfsdError
from hfsd.likeness import Similarity
from hfsd.progress import Advance, track
from hfsd.records import Example, Message

MODES = ("reference", "few-shot", "self")  # what `best` chooses from
SHOTS, SHOT_ROWS = 3, 16  # worked rewrites in a few-shot prompt, and rows tried to find them
Shot = tuple[Example, str]
Told = Callable[[list[Draft], float | None], None]  # drafts of a batch, and its seconds; None: an earlier process's


class Drafts:
    """Drafts and the references' likelihoods, as far as the log holds them.

    Args:
        engine: makes the generator; not called where the log holds every batch.
        key: seeds the batches, with the recipe's seed and each batch's place.
        similarity: of each text to its reference, 0 to 1.
    """

    def __init__(
        self, engine: Callable[[], Engine], recipe: RewriteRecipe, key: str, log: Path, similarity: Similarity
    ) -> None:
        self.recipe, self.key, self.log, self.similarity = recipe, key, log, similarity
        self.judged: dict[str, list[tuple[Draft, str]]] = {}  # row -> its drafts, each with its verdict
        self.accepted: set[tuple[str, str]] = set()  # (row, mode) with an acceptable draft
        self.reference_nats: dict[str, float | None] = {}
        self.seconds = 0.0  # of generating and scoring, in this process and in those before it
        self._make = engine
        self._engine: Engine | None = None
        self._done = _finished(log)
        self._sampling = Sampling(recipe.max_new_tokens, recipe.temperature, recipe.top_p)

    def make(self, rows: Sequence[Example], spare: Sequence[Example]) -> None:
        """Drafts for all rows: of every mode for `best`, else up to `candidates` until one is accepted.

        Raises:
            BadRequest: few-shot, and the spare rows gave too few acceptable worked rewrites (`best` does without).
            HfsdError: the engine failed, or the disk is full; finished batches are kept.
        """
        modes: tuple[str, ...] = MODES if self.recipe.how == "best" else (self.recipe.how,)
        shots = self._shots(spare) if "few-shot" in modes else []
        if not shots and self.recipe.how == "best":
            modes = ("reference", "self")
        passes = [(mode, k) for mode in modes for k in range(self.recipe.candidates)]
        with track("rewrite", len(rows) * len(modes), "drafts") as advance:
            for mode, k in passes:
                wanted = [r for r in rows if k == 0 or (r.id, mode) not in self.accepted]
                self._round(f"{mode}/{k}", mode, wanted, shots, _Live(self, advance, rows, k == 0))

    def chosen(self, row: Example) -> tuple[Draft, str]:
        """The acceptable draft that is likeliest under the original, else the first one made, with its verdict."""
        judged = self.judged[row.id]
        kept = [j for j in judged if j[1] == checks.KEPT]
        return min(kept, key=lambda j: (j[0].nats is None, j[0].nats or 0.0)) if kept else judged[0]

    def _shots(self, spare: Sequence[Example]) -> list[Shot]:
        """Worked rewrites of rows that are not trained on: acceptable ones with the reference as a guide."""
        tried = list(spare[:SHOT_ROWS])
        with track("shots", len(tried), "rows") as advance:
            self._round("shots", "reference", tried, [], lambda made, took: advance(len(made), earlier=took is None))
        found = [(row, self.chosen(row)[0].text) for row in tried if (row.id, "reference") in self.accepted][:SHOTS]
        if len(found) >= 2:
            return found
        why = f"{len(found)} of {len(tried)} rows kept for calibration have an acceptable rewrite to show"
        if self.recipe.how != "best":
            raise BadRequest(f"rewrite.mode {self.recipe.how}: {why}; use another mode, or loosen the gates")
        print(f"rewrite: {why}, so the best is taken of two modes, without few-shot", file=sys.stderr)
        return []

    def _round(self, name: str, mode: str, rows: Sequence[Example], shots: list[Shot], told: Told) -> None:
        """One draft of every row: those of the log first, then the batches that it does not hold."""
        plan = [[rows[i] for i in members] for members in plan_batches(rows, self.recipe.batch_rows)]
        absent = [number for number in range(len(plan)) if (name, number) not in self._done]
        for number in sorted(set(range(len(plan))) - set(absent)):
            told(self._taken(self._done[name, number], mode, plan[number]), None)
        if not absent:
            return
        engine = self._engine = self._engine or self._make()
        planned = (self._planned(f"{name}/{number}", mode, plan[number], shots) for number in absent)
        start = time.perf_counter()
        with closing(engine.stream(planned, self._sampling)) as made:
            for place, completions in made:
                number = absent[place]
                record = {"round": name, "batch": number, **self._measured(engine, mode, plan[number], completions)}
                end = time.perf_counter()
                # Batches may overlap: each is counted from the end of the one before, so that all sum up to the time.
                record["seconds"], start = round(end - start, 3), end
                _append(self.log, record)
                told(self._taken(record, mode, plan[number]), record["seconds"])

    def _planned(self, place: str, mode: str, rows: Sequence[Example], shots: list[Shot]) -> Batch:
        asked = [Request(row.id, messages(row, self.recipe.task, mode, shots, self.recipe.prompts)) for row in rows]
        return Batch(asked, _seed(f"{self.key} {self.recipe.seed} {place}"))

    def _measured(
        self, engine: Engine, mode: str, batch: Sequence[Example], made: Sequence[Completion]
    ) -> dict[str, Any]:
        """The drafts with their likelihood and similarity, and the likelihoods of references that have none yet."""
        new = [row for row in batch if row.id not in self.reference_nats]
        pairs = [(chat.asked(row), c.text) for row, c in zip(batch, made, strict=True)]
        nats = engine.nats([*pairs, *((chat.asked(row), row.reference) for row in new)])
        known = dict(zip((row.id for row in new), nats[len(batch) :], strict=True))
        alike = self.similarity([c.text for c in made], [row.reference for row in batch])
        drafts = [
            Draft(c.id, c.text, c.n_tokens, c.finish, mode, n, round(s, 4))
            for c, n, s in zip(made, nats, alike, strict=False)
        ]
        return {"drafts": [asdict(d) for d in drafts], "references": known}

    def _taken(self, record: dict[str, Any], mode: str, batch: Sequence[Example]) -> list[Draft]:
        """The drafts of a batch of the log, judged."""
        if [d["id"] for d in record["drafts"]] != [r.id for r in batch]:
            raise HfsdError(
                f"{self.log}: batch {record['round']} {record['batch']} is of other rows; make it again: --redo rewrite"
            )
        self.seconds += record.get("seconds", 0.0)  # an older log does not tell
        self.reference_nats |= record["references"]
        drafts = [Draft(**d) for d in record["drafts"]]
        for draft, row in zip(drafts, batch, strict=True):
            verdict = checks.verdict(draft, row, self.reference_nats[row.id], self.recipe)
            self.judged.setdefault(row.id, []).append((draft, verdict))
            if verdict == checks.KEPT:
                self.accepted.add((row.id, mode))
        return drafts


class _Live:
    """Advances the progress line with the acceptance and the tokens per second so far."""

    def __init__(self, drafts: Drafts, advance: Advance, rows: Sequence[Example], counts: bool) -> None:
        self.drafts, self.advance, self.rows, self.counts = drafts, advance, {r.id for r in rows}, counts
        self.tokens, self.seconds = 0, 0.0

    def __call__(self, made: list[Draft], seconds: float | None) -> None:
        done = self.rows & self.drafts.judged.keys()
        note = f"{len(done & {row for row, _ in self.drafts.accepted}) / len(done):.0%} accepted"
        if seconds is not None:
            self.tokens += sum(d.n_tokens for d in made)
            self.seconds += seconds
            note += f", {self.tokens / max(1e-3, self.seconds):.0f} tokens/s"
        self.advance(len(made) if self.counts else 0, note=note, earlier=seconds is None)


def messages(
    row: Example, task: str, mode: str, shots: Sequence[Shot] = (), prompts: str | None = None
) -> list[Message]:
    """What the original is asked for a row, in the words of prompts.yaml or of the file `prompts`.

    `reference`: its text with the row's prompt and reference in it. `few-shot`: the same behind worked
    rewrites. `self`: the row's own turns, and nothing else.
    """
    if mode == "self":
        return chat.asked(row)
    texts = checks.prompts(prompts)[task]
    history, system = list(row.history), texts["system"]
    if history and history[0]["role"] == "system":
        system = f"{history.pop(0)['content']}\n\n{system}"
    worked: list[Message] = []
    for example, text in shots if mode == "few-shot" else ():
        worked += [_asked(texts["user"], example), {"role": "assistant", "content": text}]
    return [{"role": "system", "content": system}, *worked, *history, _asked(texts["user"], row)]


def plan_batches(rows: Sequence[Example], size: int) -> list[list[int]]:
    """Row numbers per batch, rows of like length together so that little is padded; a function of the rows alone."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].prompt) + 2 * len(rows[i].reference), rows[i].id))
    return [order[i : i + size] for i in range(0, len(order), size)]


def _asked(template: str, row: Example) -> Message:
    filled = checks.fill(template, {"{prompt}": row.prompt, "{reference}": row.reference})
    return {"role": "user", "content": filled}


def _seed(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


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


def _finished(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Batches that are whole in the log. A torn last line is cut off, so that the next starts on a line of its own."""
    return {(r["round"], r["batch"]): r for r in _records(path)}


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            yield json.loads(line)
        except ValueError:
            raise HfsdError(f"{path}: line {number} is not JSON; make the batches again: --redo rewrite") from None
