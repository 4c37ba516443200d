"""Rows of any known shape -> `Example`, seeded splits by template, and chat templating.

A split never cuts through a group (a template of generated problems): what is held out was not trained on in disguise.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import hub
from hfsd.errors import BadRequest, nearest
from hfsd.recipe import Data
from hfsd.records import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# (prompt columns, reference column), looked for in this order; the later prompt columns may be absent or empty.
SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("question",), "answer"),  # GSM8K
    (("instruction", "input"), "output"),  # Alpaca
    (("instruction", "context"), "response"),  # Dolly
    (("problem",), "generated_solution"),  # OpenMathInstruct
    (("question",), "generated_solution"),
    (("prompt",), "completion"),
)
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt")

# Calibration text: a raw text, or a conversation in messages with role and content.
Passage = str | list[dict[str, str]]


@dataclass(frozen=True)
class Splits:
    """Disjoint by group: what is trained on, what blocks are scored and verified on, what variants are measured on."""

    train: list[Example]
    calibration: list[Example]
    held_out: list[Example]


def is_file(source: str) -> bool:
    """Whether a data source names a local file rather than a generator or a Hub dataset."""
    return Path(source).suffix in SUFFIXES


def is_hub(source: str) -> bool:
    """Whether a data source names a Hub dataset."""
    return not source.startswith("gym:") and not is_file(source)


def load(recipe: Data) -> list[Example]:
    """All usable rows of a source, exact duplicates once, in the source's order.

    Raises:
        BadRequest: the source is not there, its shape is unknown, or rows lack a prompt or reference (by number).
    """
    if recipe.source.startswith("gym:"):
        examples = _from_gym(recipe)
    else:
        rows = _read_file(recipe.source) if is_file(recipe.source) else _from_hub(recipe)
        examples = _from_rows(rows, recipe)
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
        BadRequest: as `load`; or a row holds no text or no messages (by number).
    """
    if recipe.source.startswith("gym:"):
        found: list[Passage] = [conversation(e) for e in _from_gym(recipe)]
    else:
        rows = _read_file(recipe.source) if is_file(recipe.source) else _from_hub(recipe)
        columns = list(rows[0]) if rows else []
        if "text" in columns:
            found = [str(row.get("text") or "") for row in rows]
        elif "messages" in columns:
            found = [_messages(row.get("messages"), number, recipe) for number, row in enumerate(rows, 1)]
        else:
            found = [conversation(e) for e in _from_rows(rows, recipe)]
    unique = {json.dumps(passage): passage for passage in found if passage}
    if not unique:
        raise BadRequest(f"{recipe.source} has no usable text: {len(found)} rows, all empty")
    return [unique[k] for k in sorted(unique, key=lambda k: _rank(recipe.seed, "passage", k))]


def conversation(example: Example) -> list[dict[str, str]]:
    """An example as the conversation that a model is trained on."""
    return [*prompt_messages(example.prompt), {"role": "assistant", "content": example.reference}]


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


def detect_columns(columns: Sequence[str]) -> tuple[tuple[str, ...], str] | None:
    """Prompt columns and reference column of a known shape, or None."""
    for prompts, reference in SHAPES:
        if prompts[0] in columns and reference in columns:
            return tuple(p for p in prompts if p in columns), reference
    return None


def columns_of(source: str) -> list[str]:
    """Column names of a local file, from its first row. Raises BadRequest where it has none."""
    rows = _read_file(source)
    if not rows:
        raise BadRequest(f"data.source: {source} has no rows")
    return list(rows[0])


def prompt_messages(prompt: str, system: str | None = None) -> list[dict[str, str]]:
    """A prompt as chat messages."""
    head = [{"role": "system", "content": system}] if system else []
    return [*head, {"role": "user", "content": prompt}]


def render(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The text that asks for the next assistant turn, in the model's own chat template.

    A template that has no system role gets the system text at the head of the user turn. A tokenizer without a template
    gets the messages as paragraphs: that is how a base model is prompted.
    """
    if not tokenizer.chat_template:
        return "\n\n".join(m["content"] for m in messages) + "\n\n"
    return _templated(tokenizer, messages, ask=True)


def transcript(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The text of a whole conversation, as `render` writes it, with nothing asked at its end."""
    if not tokenizer.chat_template:
        return "\n\n".join(m["content"] for m in messages)
    return _templated(tokenizer, messages, ask=False)


def answer_ids(tokenizer: PreTrainedTokenizerBase, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """Token ids of a prompt in the chat template, and of the answer that follows it (no end-of-turn token)."""
    head = tokenizer(render(tokenizer, prompt_messages(prompt)), add_special_tokens=False)["input_ids"]
    return head, tokenizer(answer, add_special_tokens=False)["input_ids"]


def _templated(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], ask: bool) -> str:
    text = _apply(tokenizer, messages, ask)
    if messages[0]["role"] == "system" and len(messages) > 1 and (text is None or messages[0]["content"] not in text):
        folded = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        text = _apply(tokenizer, [{"role": messages[1]["role"], "content": folded}, *messages[2:]], ask)
    if text is None:
        roles = ", ".join(m["role"] for m in messages)
        raise BadRequest(f"the model's chat template refuses the turns {roles}; fix chat_template in its tokenizer")
    return text


def _apply(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], ask: bool) -> str | None:
    import jinja2

    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask))
    except jinja2.TemplateError:
        return None


def _messages(value: Any, number: int, recipe: Data) -> list[dict[str, str]]:
    """The turns of a `messages` cell, as roles and contents."""
    try:
        turns = [{"role": str(m["role"]), "content": str(m["content"] or "")} for m in value]
    except (TypeError, KeyError):
        turns = []
    if not turns:
        raise BadRequest(f"{recipe.source}: row {number} (counted from 1) has no messages with role and content")
    return turns


def _rank(seed: int, kind: str, name: str) -> bytes:
    """A seeded order that does not depend on what else is in the list."""
    return hashlib.sha256(f"{seed} {kind} {name}".encode()).digest()


def _example(prompt: str, reference: str, group: str = "") -> Example:
    digest = hashlib.sha256(f"{prompt}\x00{reference}".encode()).hexdigest()[:16]
    return Example(digest, prompt, reference, group)


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
        examples.append(_example(row["question"].strip(), worked.strip(), group))
    return examples


def _from_hub(recipe: Data) -> list[dict[str, Any]]:
    return hub.dataset_rows(recipe.source, recipe.config, recipe.split, recipe.revision)


def _from_rows(rows: list[dict[str, Any]], recipe: Data) -> list[Example]:
    if not rows:
        raise BadRequest(f"data.source: {recipe.source} has no rows")
    if recipe.prompt_column and recipe.reference_column:
        prompts: tuple[str, ...] = (recipe.prompt_column,)
        reference = recipe.reference_column
        if absent := {*prompts, reference} - set(rows[0]):
            raise BadRequest(f"data.source: {recipe.source} has no column {sorted(absent)}; it has {sorted(rows[0])}")
    else:
        found = detect_columns(list(rows[0]))
        if found is None:
            raise BadRequest(
                f"data.source: {recipe.source} has columns {sorted(rows[0])}, which is no known shape; "
                "set data.prompt_column and data.reference_column"
            )
        prompts, reference = found
    examples, bad = [], []
    for number, row in enumerate(rows, 1):
        texts = [str(row[c]).strip() for c in prompts if row.get(c)]
        answer = str(row.get(reference) or "").strip()
        if not answer or not row.get(prompts[0]):
            bad.append(number)
            continue
        examples.append(_example("\n\n".join(texts), answer))
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        raise BadRequest(
            f"data.source: {recipe.source}: rows {shown} (counted from 1) lack a prompt or a reference; mend them"
        )
    return examples


def _read_file(source: str) -> list[dict[str, Any]]:
    path = Path(source).expanduser()
    if not path.is_file():
        raise BadRequest(f"data.source: no file {source}")
    if path.suffix == ".parquet":
        import pyarrow.parquet

        return pyarrow.parquet.read_table(path).to_pylist()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return [{"text": text}]
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(keepends=True)))
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
