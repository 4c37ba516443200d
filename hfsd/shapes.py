"""Rows of any known shape -> `Example`: one per answer, so one per assistant turn of a conversation."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from hfsd.errors import BadRequest
from hfsd.recipe import Data
from hfsd.records import Example, Message

Row = dict[str, Any]

# (prompt columns, reference column), looked for in this order; the later prompt columns may be absent or empty.
SHAPES: tuple[tuple[tuple[str, ...], str], ...] = (
    (("question",), "answer"),  # GSM8K
    (("instruction", "input"), "output"),  # Alpaca
    (("instruction", "context"), "response"),  # Dolly
    (("problem",), "generated_solution"),  # OpenMathInstruct
    (("question",), "generated_solution"),
    (("prompt",), "completion"),  # TRL, plain or as lists of messages
)
FINAL_ANSWER = "expected_answer"  # OpenMathInstruct states it apart from the solution
# Any other table with one column of each list is plain questions and answers.
PROMPT_NAMES = ("question", "query", "prompt", "instruction", "problem", "input", "user")
REFERENCE_NAMES = ("answer", "response", "output", "completion", "solution", "target", "assistant")


def detect_columns(columns: Sequence[str]) -> tuple[tuple[str, ...], str] | None:
    """Prompt columns and reference column of a known shape, or None."""
    for prompts, reference in SHAPES:
        if prompts[0] in columns and reference in columns:
            return tuple(p for p in prompts if p in columns), reference
    plain = [[c for c in columns if c.lower() in names] for names in (PROMPT_NAMES, REFERENCE_NAMES)]
    if all(len(found) == 1 for found in plain):
        return (plain[0][0],), plain[1][0]
    return None


def examples(rows: Sequence[Row], recipe: Data) -> list[Example]:
    """Every answer of the rows. Rows that lack a prompt or an answer are left out and told by number, on stderr.

    Raises:
        BadRequest: no rows, a column that is not there, an unknown shape, or not one usable row.
    """
    if not rows:
        raise BadRequest(f"data.source: {recipe.source} has no rows")
    found: list[Example] = []
    bad: list[int] = []
    if "messages" in rows[0] and recipe.prompt_column is None:
        for number, turns in enumerate(conversations(rows, recipe), 1):
            made = _of_conversation(turns)
            found += made
            bad += [] if made else [number]
    else:
        prompts, reference = _columns(rows[0], recipe)
        for number, row in enumerate(rows, 1):
            one = _of_row(row, prompts, reference)
            if one is None:
                bad.append(number)
            else:
                found.append(one)
    if bad:
        shown = ", ".join(map(str, bad[:10])) + (", ..." if len(bad) > 10 else "")
        told = f"{len(bad)} of {len(rows)} rows lack a prompt or a reference: {shown} (counted from 1)"
        if not found:
            raise BadRequest(f"data.source: {recipe.source}: {told}")
        print(f"{recipe.source}: {told}; they are left out", file=sys.stderr)
    return found


def conversations(rows: Sequence[Row], recipe: Data) -> Iterator[list[Message]]:
    """The `messages` of each row as roles and contents.

    Raises:
        BadRequest: a row has none (by number).
    """
    for number, row in enumerate(rows, 1):
        turns = _turns(row.get("messages"))
        if not turns:
            raise BadRequest(f"{recipe.source}: row {number} (counted from 1) has no messages with role and content")
        yield turns


def example(
    prompt: str, reference: str, group: str = "", history: tuple[Message, ...] = (), answer: str = ""
) -> Example:
    """An example whose id is a digest of what it says, so that exact duplicates have one id."""
    return Example(_digest(history, prompt, reference), prompt, reference, group, history, answer)


def _of_conversation(turns: list[Message]) -> list[Example]:
    """One example per assistant turn that answers a user turn; all of a conversation are one group."""
    group, found = _digest(turns), []
    for at in range(1, len(turns)):
        asked, answered = turns[at - 1], turns[at]
        if (asked["role"], answered["role"]) == ("user", "assistant"):
            prompt, reference = asked["content"].strip(), answered["content"].strip()
            if prompt and reference:
                found.append(example(prompt, reference, group, tuple(turns[: at - 1])))
    return found


def _digest(turns: Sequence[Message], *texts: str) -> str:
    said = [*(f"{m['role']}\x01{m['content']}" for m in turns), *texts]
    return hashlib.sha256("\x00".join(said).encode()).hexdigest()[:16]


def _of_row(row: Row, prompts: tuple[str, ...], reference: str) -> Example | None:
    if turns := _turns(row.get(prompts[0])):
        answers = _turns(row.get(reference))
        made = _of_conversation([*turns, *answers])
        return made[-1] if made and len(answers) == 1 else None
    texts = [str(row[c]).strip() for c in prompts if row.get(c)]
    answer = str(row.get(reference) or "").strip()
    if not answer or not str(row.get(prompts[0]) or "").strip():
        return None
    stated = str(row.get(FINAL_ANSWER) or "").strip()
    return example("\n\n".join(t for t in texts if t), answer, answer=stated)


def _columns(first: Row, recipe: Data) -> tuple[tuple[str, ...], str]:
    if recipe.prompt_column and recipe.reference_column:
        if absent := {recipe.prompt_column, recipe.reference_column} - set(first):
            raise BadRequest(f"data.source: {recipe.source} has no column {sorted(absent)}; it has {sorted(first)}")
        return (recipe.prompt_column,), recipe.reference_column
    found = detect_columns(list(first))
    if found is None:
        raise BadRequest(
            f"data.source: {recipe.source} has columns {sorted(first)}, which is no known shape; "
            "set data.prompt_column and data.reference_column"
        )
    return found


def _turns(value: Any) -> list[Message]:
    """A cell's messages; none where it holds no list of roles and contents."""
    if not isinstance(value, list | tuple):
        return []
    try:
        return [{"role": str(m["role"]), "content": _text(m["content"])} for m in value]
    except (TypeError, KeyError):
        return []


def _text(content: Any) -> str:
    """A message's text; of a list of parts, that of its text parts."""
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text") or "") for part in content if part.get("type", "text") == "text")
    return str(content or "")
