"""Is a rewrite acceptable? Gates on what it says and how, each with the reason that is recorded."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hfsd.answers import same_answer, same_choice, same_text, stated
from hfsd.blocks_recovery import Rewrite as RewriteRecipe
from hfsd.errors import BadRequest, nearest
from hfsd.records import Example

KEPT = "kept"
SLACK = 200  # characters that any rewrite may be longer than its reference, which may be one word
# Scripts without spaces between words. A Chinese character or kana counts as a word; a letter of Thai, Lao, Burmese or
# Khmer would be too common for one, so there each pair of letters is.
HAN = "\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
THAI = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
WORDS = re.compile(rf"[{HAN}]|(?=([{THAI}]{{2}}))[{THAI}]|[^\W{HAN}{THAI}]+")


@cache
def prompts(path: str | None = None) -> dict[str, Any]:
    """prompts.yaml: the texts per task kind, the leak phrases, and the headings that are not to be echoed.

    Args:
        path: a file of the same shape, whose keys replace the packaged ones.

    Raises:
        BadRequest: that file is not there, or not of that shape.
    """
    packaged = yaml.safe_load((Path(__file__).parent / "prompts.yaml").read_text(encoding="utf-8"))
    return packaged if path is None else {**packaged, **_own_prompts(path, packaged)}


def _own_prompts(path: str, packaged: dict[str, Any]) -> dict[str, Any]:
    try:
        own = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise BadRequest(f"rewrite.prompts: cannot read {path}: {' '.join(str(error).split())[:200]}") from None
    if not isinstance(own, dict) or not own:
        raise BadRequest(f"rewrite.prompts: {path} must map some of {', '.join(packaged)} to texts")
    if fault := next(filter(None, (_prompt_fault(*item, packaged) for item in own.items())), None):
        raise BadRequest(f"rewrite.prompts: {path}: {fault}")
    return {k: v if isinstance(v, dict) else [text.casefold() for text in v] for k, v in own.items()}


def _prompt_fault(key: Any, value: Any, packaged: dict[str, Any]) -> str | None:
    if key not in packaged:
        return f"unknown key {key!r}{nearest(str(key), packaged)}; known are: {', '.join(packaged)}"
    if isinstance(packaged[key], list):
        whole = isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)
        return None if whole else f"{key} must be a list of texts"
    texts = value if isinstance(value, dict) else {}
    whole = set(texts) == {"system", "user"} and all(isinstance(text, str) for text in texts.values())
    if not whole or not all(place in texts["user"] for place in ("{prompt}", "{reference}")):
        return f"{key} must hold the texts system and user, with the places {{prompt}} and {{reference}} in user"
    return None


@dataclass(frozen=True)
class Draft:
    """One rewrite of one row before it is judged.

    `nats` is its loss per token under the original, given the prompt alone; None: not measured. `similarity` is that to
    the reference, 0 to 1.
    """

    id: str
    text: str
    n_tokens: int
    finish: str
    mode: str
    nats: float | None = None
    similarity: float = 0.0


def verdict(draft: Draft, row: Example, reference_nats: float | None, rules: RewriteRecipe) -> str:
    """`kept`, or why the reference is used instead; the reasons are explained in `text.REASONS`."""
    text = draft.text.strip()
    if draft.finish.startswith("failed"):
        return "failed"
    if not text:
        return "empty"
    if draft.finish == "length":
        return "truncated"
    folded = text.casefold()
    known = f"{row.prompt}\n{row.reference}".casefold()  # which may be about references, or hold such headings
    texts = prompts(rules.prompts)
    if any(phrase in folded and phrase not in known for phrase in texts["leaks"]):
        return "leak"
    if _echoed(folded, texts["headings"]) - _echoed(row.reference.casefold(), texts["headings"]):
        return "echo"
    if rules.max_growth is not None and len(text) > rules.max_growth * len(row.reference) + SLACK:
        return "too long"
    check = check_of(rules, row)
    if check != "none" and not CHECKS[check](text, stated(row.answer) if row.answer else row.reference):
        return "wrong answer"
    if draft.similarity < rules.min_similarity:
        return "unlike"
    if rules.likelier and draft.nats is not None and reference_nats is not None and draft.nats > reference_nats:
        return "unlikely"
    return KEPT


def check_of(rules: RewriteRecipe, row: Example) -> str:
    """The check of a row's answer. `auto`: math for math; for code the tool calls, where the reference makes any."""
    if rules.check != "auto":
        return rules.check
    if rules.task == "code":
        return "json" if tool_calls(row.answer or row.reference) else "none"
    return "math" if rules.task == "math" else "none"


def same_calls(text: str, truth: str) -> bool:
    """Whether both hold the same tool calls: names and arguments, in any order of the calls and of the arguments."""
    mine, theirs = tool_calls(text), tool_calls(truth)
    return bool(mine) and mine == theirs


CHECKS: dict[str, Callable[[str, str], bool]] = {
    "math": same_answer,
    "exact": same_text,
    "choice": same_choice,
    "json": same_calls,
}


def tool_calls(text: str) -> list[str]:
    """The tool calls in a text (`name` with `arguments` or `parameters`), each in one canonical spelling, sorted."""
    return sorted(json.dumps(call, sort_keys=True) for value in _json_values(text) for call in _calls(value))


def _calls(value: Any, depth: int = 6) -> Iterator[dict[str, Any]]:
    """The calls in lists and in OpenAI's wrappings, which are nested less deeply than `depth`."""
    if isinstance(value, list) and depth:
        for part in value:
            yield from _calls(part, depth - 1)
    elif isinstance(value, dict):
        inner = next((value[key] for key in ("tool_calls", "function_call", "function") if key in value), None)
        if isinstance(inner, dict | list) and depth:
            yield from _calls(inner, depth - 1)
        elif isinstance(value.get("name"), str) and ("arguments" in value or "parameters" in value):
            arguments = value.get("arguments", value.get("parameters"))
            if isinstance(arguments, str):
                with suppress(ValueError, RecursionError):  # a plain text is an argument too
                    arguments = json.loads(arguments)
            yield {"name": value["name"], "arguments": arguments}


def _json_values(text: str) -> Iterator[Any]:
    """Every JSON object or array in a text, outermost ones only."""
    decoder, at = json.JSONDecoder(), 0
    while (found := re.compile(r"[{\[]").search(text, at)) is not None:
        try:
            value, at = decoder.raw_decode(text, found.start())
            yield value
        except (ValueError, RecursionError):  # a model that repeats itself opens a thousand brackets
            at = found.end()


def overlap(text: str, reference: str) -> float:
    """F1 of the words of two texts, counted with repetition, 0 to 1 (ROUGE-1); 1 where they are the same text."""
    if text.strip() == reference.strip():
        return 1.0
    mine, theirs = (Counter(m[1] or m[0] for m in WORDS.finditer(t.casefold())) for t in (text, reference))
    common = sum((mine & theirs).values())
    return 2 * common / (mine.total() + theirs.total()) if common else 0.0


def _echoed(folded: str, headings: Collection[str]) -> set[str]:
    """The headings that lines of a text are, or begin with: `Response`, `**Response:** 4`, `Reference answer: 4`.

    One bare word with a colon and text behind it is an ordinary line, such as `Question: what is it?`.
    """
    found = set()
    for line in folded.splitlines():
        before, _, behind = line.strip().partition(":")
        heading = before.strip(" \t#*_")
        marked = re.match(r"#|[*_]+\S", before)  # `* Response` is of a list
        if heading in headings and (marked or " " in heading or not behind.strip(" \t#*_:")):
            found.add(heading)
    return found


def fill(template: str, values: dict[str, str]) -> str:
    """Replaces `{name}` literally, in one pass: braces or places inside a value stay as they are."""
    return "".join(values.get(part, part) for part in re.split(r"(\{\w+\})", template))
