"""Where rows come from, and seeded splits by template.

A split never cuts through a group (a template of generated problems, a conversation): what is held out was not trained
on in disguise.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfsd import chat, hub, shapes
from hfsd.blocks_cut import Data
from hfsd.errors import BadRequest, nearest
from hfsd.records import Example, Message

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")

# Calibration text: a raw text, or a conversation in messages with role and content.
Passage = str | list[Message]


@dataclass(frozen=True)
class Splits:
    """Disjoint by group: what is trained on, what blocks are scored and verified on, what variants are measured on."""

    train: list[Example]
    calibration: list[Example]
    held_out: list[Example]


def is_file(source: str) -> bool:
    """Whether a data source names a local file rather than a generator or a Hub dataset."""
    return Path(source).suffix in SUFFIXES or Path(source).expanduser().is_file()


def is_hub(source: str) -> bool:
    """Whether a data source names a Hub dataset."""
    return not source.startswith("gym:") and not is_file(source)


def load(recipe: Data) -> list[Example]:
    """All usable rows of a source, exact duplicates once, in the source's order.

    Raises:
        BadRequest: the source is not there, its shape is unknown, or it has no usable row.
    """
    if recipe.source.startswith("gym:"):
        examples = _from_gym(recipe)
    else:
        rows = _read_file(recipe.source) if is_file(recipe.source) else _from_hub(recipe)
        examples = shapes.examples(rows, recipe)
    unique = list({e.id: e for e in examples}.values())
    if recipe.max_chars is not None:
        unique = [e for e in unique if len(e.prompt) + len(e.reference) <= recipe.max_chars]
    if not unique:
        raise BadRequest(f"data.source: {recipe.source} has no usable row (data.max_chars: {recipe.max_chars})")
    return unique


def passages(recipe: Data) -> list[Passage]:
    """All calibration text of a source, exact duplicates once, in a seeded order.

    A `text` column is raw text (a .txt file is one such text); `messages` and every shape that `load` knows are
    conversations.

    Raises:
        BadRequest: as `load`; or no row holds text or messages.
    """
    if recipe.source.startswith("gym:"):
        found: list[Passage] = [chat.conversation(e) for e in _from_gym(recipe)]
    else:
        rows = _read_file(recipe.source) if is_file(recipe.source) else _from_hub(recipe)
        columns = list(rows[0]) if rows else []
        if "text" in columns:
            found = [str(row.get("text") or "") for row in rows]
        elif "messages" in columns:
            found = list(shapes.conversations(rows, recipe))
        else:
            found = [chat.conversation(e) for e in shapes.examples(rows, recipe)]
    unique = {json.dumps(p): p for p in found if (p.strip() if isinstance(p, str) else p)}
    if not unique:
        raise BadRequest(f"{recipe.source} has no usable text: {len(found)} rows, all empty")
    return [unique[k] for k in sorted(unique, key=lambda k: _rank(recipe.seed, "passage", k))]


def commit(recipe: Data) -> str | None:
    """The Hub commit whose rows are read; None for what is not on the Hub, and where the Hub does not tell."""
    return hub.dataset_commit(recipe.source, recipe.revision) if is_hub(recipe.source) else None


def split(examples: Sequence[Example], recipe: Data) -> Splits:
    """Training, calibration and held-out rows, disjoint by group, each in a seeded order.

    Raises:
        BadRequest: there are too few groups for three disjoint splits.
    """
    groups: dict[str, list[Example]] = {}
    for example in examples:
        groups.setdefault(example.group or example.id, []).append(example)
    order = sorted(groups, key=lambda g: _rank(recipe.seed, "group", g))
    held, calibration = (max(1, round(share * len(order))) for share in (recipe.held_out, recipe.calibration))
    if len(order) < held + calibration + 1:
        raise BadRequest(f"data: {len(examples)} rows in {len(order)} groups are too few for three disjoint splits")

    def rows(names: Iterable[str]) -> list[Example]:
        picked = [e for name in names for e in groups[name]]
        return sorted(picked, key=lambda e: _rank(recipe.seed, "row", e.id))

    train = rows(order[held + calibration :])[: recipe.rows]
    return Splits(train, rows(order[held : held + calibration]), rows(order[:held]))


def columns_of(source: str) -> list[str]:
    """Column names of a local file, from its first row. Raises BadRequest where it has none."""
    rows = _read_file(source)
    if not rows:
        raise BadRequest(f"data.source: {source} has no rows")
    return list(rows[0])


def _rank(seed: int, kind: str, name: str) -> bytes:
    """A seeded order that does not depend on what else is in the list."""
    return hashlib.sha256(f"{seed} {kind} {name}".encode()).digest()


def _from_gym(recipe: Data) -> list[Example]:
    try:
        import reasoning_gym
    except ImportError:
        raise BadRequest("data.source gym:NAME needs reasoning-gym: pip install 'hfsd[demo]'") from None
    name = recipe.source.removeprefix("gym:")
    known = list(reasoning_gym.factory.DATASETS)
    if name not in known:
        raise BadRequest(f"data.source: reasoning-gym has no data set '{name}'{nearest(name, known)}")
    examples = []
    for row in reasoning_gym.create_dataset(name, size=recipe.pool, seed=recipe.seed):
        variables = row["metadata"].get("variables")
        group = ",".join(sorted(variables)) if isinstance(variables, dict) else ""
        worked = row["metadata"].get("answer_cot") or str(row["answer"])
        examples.append(shapes.example(row["question"].strip(), worked.strip(), group=group))
    return examples


def _from_hub(recipe: Data) -> list[dict[str, Any]]:
    first = recipe.pool if recipe.streaming else None
    return hub.dataset_rows(recipe.source, recipe.config, recipe.split, recipe.revision, first)


def _read_file(source: str) -> list[dict[str, Any]]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise BadRequest(f"data.source: no file {source}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    try:
        text = path.read_bytes().decode("utf-8-sig")  # line ends inside a CSV field stay as they are
        if path.suffix == ".csv":
            csv.field_size_limit(max(csv.field_size_limit(), len(text) + 1))  # 128 KB at first; the whole process's
            return list(csv.DictReader(io.StringIO(text, newline="")))
        if path.suffix not in (".json", ".jsonl"):
            return [{"text": text}]
        rows = json.loads(text) if path.suffix == ".json" else _json_lines(text, source)
    except UnicodeDecodeError as error:
        raise BadRequest(f"data.source: {source} is not UTF-8 text (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise BadRequest(f"data.source: {source} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise BadRequest(f"data.source: {source} is not a list of objects")
    return rows


def _json_lines(text: str, source: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise BadRequest(f"data.source: {source} line {number} is not JSON: {error.msg}") from None
    return rows
