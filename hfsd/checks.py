"""Is a rewrite acceptable? Gates on what it says and how, each with the reason that is recorded."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hfsd.answers import CHECKS, tool_calls
from hfsd.recipe import Rewrite as RewriteRecipe
from hfsd.records import Example

KEPT = "kept"
SLACK = 200  # characters that any rewrite may be longer than its reference, which may be one word


@cache
def prompts() -> dict[str, Any]:
    """prompts.yaml: the texts per task kind, the leak phrases, and the headings that are not to be echoed."""
    return yaml.safe_load((Path(__file__).parent / "prompts.yaml").read_text(encoding="utf-8"))


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
    if any(phrase in folded for phrase in prompts()["leaks"]):
        return "leak"
    if _echoes(folded):
        return "echo"
    if rules.max_growth is not None and len(text) > rules.max_growth * len(row.reference) + SLACK:
        return "too long"
    check = check_of(rules, row)
    if check != "none" and not CHECKS[check](text, row.answer or row.reference):
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


def overlap(text: str, reference: str) -> float:
    """F1 of the words of two texts, counted with repetition, 0 to 1 (ROUGE-1)."""
    mine, theirs = (Counter(re.findall(r"\w+", t.casefold())) for t in (text, reference))
    common = sum((mine & theirs).values())
    return 2 * common / (mine.total() + theirs.total()) if common else 0.0


def _echoes(folded: str) -> bool:
    """Whether a line is one of the headings of the prompt, bare or with a colon or markup."""
    headings = set(prompts()["headings"])
    lines = (line.strip(" \t#*_:") for line in folded.splitlines())
    return any(line in headings for line in lines)


def fill(template: str, values: dict[str, str]) -> str:
    """Replaces `{name}` literally, in one pass: braces or places inside a value stay as they are."""
    return "".join(values.get(part, part) for part in re.split(r"(\{\w+\})", template))
