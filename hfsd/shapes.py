"""Rows of any known shape -> `Example`: one per answer, so one per assistant turn of a conversation."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from typing import Any

from hfsd.blocks_cut import Data
from hfsd.errors import BadRequest
from hfsd.records import Example, Message

Row = dict[str, Any]

# (prompt column, reference column), looked for in this order.
SHAPES: tuple[tuple[str, str], ...] = (
    ("question", "answer"),  # GSM8K
    ("instruction", "output"),  # Alpaca
    ("instruction", "response"),  # Dolly
    ("problem", "generated_solution"),  # OpenMathInstruct
    ("question", "generated_solution"),
    ("prompt", "completion"),  # TRL, plain or as lists of messages
)
LATER = ("input", "context")  # a table's other prompt columns, which may be empty: they stand behind the first one
NEITHER = "lack a prompt or a reference"
FINAL_ANSWER = "expected_answer"  # OpenMathInstruct states it apart from the solution
# Any other table with one column of each list is plain questions and answers.
PROMPT_NAMES = ("question", "query", "prompt", "instruction", "problem", "input", "user")
REFERENCE_NAMES = ("answer", "response", "output", "completion", "solution", "target", "assistant")


def detect_columns(columns: Sequence[str]) -> tuple[tuple[str, ...], str] | None:
    """Prompt columns and reference column of a known shape, or None."""
    plain = [[c for c in columns if c.lower() in names] for names in (PROMPT_NAMES, REFERENCE_NAMES)]
    found = next((shape for shape in SHAPES if set(shape) <= set(columns)), None)
    if found is None and all(len(names) == 1 for names in plain):
        found = plain[0][0], plain[1][0]
    if found is None:
        return None
    later = [c for name in LATER for c in columns if c.lower() == name and c not in found]
    return (found[0], *later), found[1]


def examples(rows: Sequence[Row], recipe: Data) -> list[Example]:
    """Every answer of the rows. What lacks a prompt or an answer is left out and told by number, on stderr.

    Raises:
        BadRequest: no rows, a column that is not there, an unknown shape, or not one usable row.
    """
    if not rows:
        raise BadRequest(f"data.source: {recipe.source} has no rows")
    if (recipe.prompt_column is None) != (recipe.reference_column is None):
        names = ("prompt_column", "reference_column")
        missing, given = names if recipe.prompt_column is None else names[::-1]
        raise BadRequest(
            f"data.{missing} is missing beside data.{given}: give both columns, or neither to have them found"
        )
    if "messages" in rows[0] and recipe.prompt_column is None:
        return _of_conversations(rows, recipe)
    prompts, reference = _columns(rows[0], recipe)
    made = [_of_row(row, prompts, reference) for row in rows]
    _tell(recipe, [n for n, one in enumerate(made, 1) if one is None], len(rows), NEITHER)
    return [one for one in made if one is not None]


def conversations(rows: Sequence[Row], recipe: Data) -> list[list[Message]]:
    """The `messages` of each row as roles and contents. Rows without any are left out and told by number, on stderr.

    Raises:
        BadRequest: no row has any.
    """
    found = [_turns(row.get("messages")) for row in rows]
    _tell(
        recipe,
        [n for n, turns in enumerate(found, 1) if not turns],
        len(rows),
        "have no messages with role and content",
    )
    return [turns for turns in found if turns]


def example(
    prompt: str, reference: str, group: str = "", history: tuple[Message, ...] = (), answer: str = ""
) -> Example:
    """An example whose id is a digest of what it says, so that exact duplicates have one id."""
    return Example(_digest(history, prompt, reference), prompt, reference, group, history, answer)


def _of_conversations(rows: Sequence[Row], recipe: Data) -> list[Example]:
    """The answers of all conversations; those that are none are told by the number of their row."""
    made = [_of_conversation(_turns(row.get("messages"))) for row in rows]
    usable = [any(answers) for answers in made]
    _tell(recipe, [n for n, some in enumerate(usable, 1) if not some], len(rows), NEITHER)
    holes = [n for n, answers in enumerate(made, 1) if usable[n - 1] and None in answers]
    turns = sum(made[n - 1].count(None) for n in holes)
    what = f"have assistant turns that are empty or answer no user turn, {turns} in all"
    _tell(recipe, holes, len(rows), what, rows_stay=True)
    return [one for answers in made for one in answers if one is not None]


def _tell(recipe: Data, numbers: Sequence[int], total: int, what: str, rows_stay: bool = False) -> None:
    """What is left out, by the numbers of its rows. Raises BadRequest where no row is left."""
    if not numbers:
        return
    shown = ", ".join(map(str, numbers[:10])) + (", ..." if len(numbers) > 10 else "")
    told = f"{len(numbers)} of {total} rows {what}: {shown} (counted from 1)"
    if len(numbers) == total and not rows_stay:
        raise BadRequest(f"data.source: {recipe.source}: {told}")
    print(f"{recipe.source}: {told}; {'these turns' if rows_stay else 'they'} are left out", file=sys.stderr)


def _of_conversation(turns: list[Message]) -> list[Example | None]:
    """Per assistant turn its example, or None; all of a conversation are one group."""
    group = _digest(turns)
    return [_of_turn(turns[:at], turn, group) for at, turn in enumerate(turns) if turn["role"] == "assistant"]


def _of_turn(before: list[Message], answered: Message, group: str) -> Example | None:
    """An assistant turn as an example; None where it is empty, or answers a tool or another assistant turn.

    An example's prompt is a user turn, so what follows another turn has none.
    """
    if not before or before[-1]["role"] != "user":
        return None
    prompt, reference = before[-1]["content"].strip(), answered["content"].strip()
    return example(prompt, reference, group, tuple(before[:-1])) if prompt and reference else None


def _digest(turns: Sequence[Message], *texts: str) -> str:
    said = [*(f"{m['role']}\x01{m['content']}" for m in turns), *texts]
    return hashlib.sha256("\x00".join(said).encode()).hexdigest()[:16]


def _of_row(row: Row, prompts: tuple[str, ...], reference: str) -> Example | None:
    turns, answers = _turns(row.get(prompts[0])), _turns(row.get(reference))
    if turns or answers:
        alone = [a["role"] for a in answers] == ["assistant"]
        return _of_turn(turns, answers[0], _digest([*turns, *answers])) if alone else None
    first, *later = (_cell(row.get(column)) for column in prompts)
    answer = _cell(row.get(reference))
    if not first or not answer:
        return None
    return example("\n\n".join([first, *filter(None, later)]), answer, answer=_cell(row.get(FINAL_ANSWER)))


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
    """A cell's messages; none where it holds no list of turns with a role. A turn that calls a tool has no content."""
    if not isinstance(value, list | tuple):
        return []
    try:
        return [{"role": str(m["role"]), "content": _text(m.get("content"))} for m in value]
    except (TypeError, KeyError, AttributeError):
        return []


def _text(content: Any) -> str:
    """A message's text; of a list of parts, that of its text parts."""
    if isinstance(content, list | tuple):
        return "".join(str(part.get("text") or "") for part in content if part.get("type", "text") == "text")
    return "" if content is None else str(content)


def _cell(value: Any) -> str:
    """A cell's text: 0 is an answer, and what holds more than one value is stated as JSON."""
    if value is None or value in ([], {}):
        return ""
    return (
        json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else str(value)
    ).strip()
