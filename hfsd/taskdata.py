"""Documents of the packaged demo tasks (`hfsd/tasks/*.yaml`), built from held-out word problems with worked solutions.

A worked solution ends in a line `#### n`, and its last `=` is followed by n. All three tasks ask the same problems, so
that the evaluation computes a question, and its right solution, once for all of them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from hfsd.errors import BadRequest
from hfsd.records import Example
from hfsd.rundir import write_atomic

CHOICES = 4
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
OPERATOR = re.compile(r"\s*[-+*/x×÷]\s*\d")  # `= 1/2` goes on: the first number is not the result
SLIPS = ((-1, 1, -2, 2), (-3, 3))  # the second only where the first leaves too few (results 1 and 9)

Document = dict[str, Any]


def build(examples: Sequence[Example], limit: int | None, seed: int) -> dict[str, list[Document]]:
    """The documents of demo_match, demo_rank and demo_bpb, over the same problems, templates taken in turn.

    demo_match: the worked solution of this problem among those of three other problems of its template, which differ
    in names and numbers. demo_rank: the right solution and three whose last step is miscalculated (`miscalculated`).
    demo_bpb: the solution alone. A problem is left out where its template has fewer than three other solutions, or
    where its last step cannot be miscalculated cleanly.

    Args:
        examples: held-out rows; rows of one `group` are of one template.
        limit: documents per task; None: all that are possible.
        seed: of the order, the distractors and the place of the right choice; the rows' order decides nothing.

    Returns:
        Task name -> documents with `id`, `group`, `question`, `choices` and `gold`, the index of the right one.

    Raises:
        BadRequest: no document can be built.
    """
    siblings: dict[str, list[str]] = {}
    for example in sorted(examples, key=lambda e: e.id):
        siblings.setdefault(example.group, []).append(example.reference)
    docs: dict[str, list[Document]] = {"demo_match": [], "demo_rank": [], "demo_bpb": []}
    for example in _templates_in_turn(examples, seed):
        others = sorted(set(siblings[example.group]) - {example.reference})
        wrong = miscalculated(example.reference, CHOICES - 1, _random(seed, "slip", example.id))
        if len(others) < CHOICES - 1 or wrong is None:
            continue
        others = _random(seed, "others", example.id).sample(others, CHOICES - 1)
        docs["demo_match"].append(_choose(example, others, _random(seed, "match", example.id)))
        docs["demo_rank"].append(_choose(example, wrong, _random(seed, "rank", example.id)))
        docs["demo_bpb"].append(_choose(example, (), _random(seed, "bpb", example.id)))
        if len(docs["demo_bpb"]) == limit:
            break
    if not docs["demo_bpb"]:
        raise BadRequest(
            f"evaluate.tasks: demo needs problems whose worked solutions end in '= n' and '#### n', {CHOICES} or more "
            f"of a template; none of the {len(examples)} held-out rows serves; choose other tasks or a larger data.pool"
        )
    return docs


def write(docs: Mapping[str, Sequence[Document]], folder: Path) -> None:
    """Writes one TASK.jsonl per task, each whole or not at all.

    Raises:
        HfsdError: the disk is full or read-only.
    """
    for task, documents in docs.items():
        lines = (json.dumps(d, ensure_ascii=False, sort_keys=True) + "\n" for d in documents)
        write_atomic(folder / f"{task}.jsonl", "".join(lines))


def miscalculated(reference: str, count: int, rng: random.Random) -> list[str] | None:
    """Copies of a worked solution whose last step has a wrong result, carried through to the final answer.

    The last step is the one to change: what follows it only repeats its result, so carrying the wrong number needs no
    judgement, and no copy contradicts itself. (With an earlier step changed and the text after it left alone, a model
    would find the right solution by copying: only there do the numbers agree with one another.) A wrong result has one
    digit of the right one off by one or two. It has as many digits, and as many closing zeros, so that neither its
    length nor its roundness tells it from the right one: the arithmetic of that step must.

    Returns:
        `count` distinct texts, or None where the solution has no such step: its last `=` is not followed by the final
        answer, or that number already stands in the step before the `=` (as an operand, or announced).
    """
    spans = _result_spans(reference)
    if not spans:
        return None
    results = _slips(_value(reference[slice(*spans[0])]), count)
    if len(results) < count:
        return None
    return [_replaced(reference, spans, wrong) for wrong in rng.sample(results, count)]


def _result_spans(reference: str) -> list[tuple[int, int]]:
    """Where the last step's result stands, from there to the `####` line; empty if there is no clean last step."""
    body, mark, final = reference.rstrip().rpartition("\n#### ")
    stated = NUMBER.fullmatch(final.strip())
    equals = body.rfind("=")
    result = NUMBER.search(body, equals) if equals >= 0 else None
    if not mark or not stated or not result or OPERATOR.match(body, result.end()):
        return []
    answer = _value(stated[0])
    if _value(result[0]) != answer or re.search(r"[\w.-]", body[equals + 1 : result.start()]):
        return []
    step = body.rfind("\n", 0, equals) + 1
    if any(_value(m[0]) == answer for m in NUMBER.finditer(body, step, equals)):
        return []
    return [m.span() for m in NUMBER.finditer(reference, result.start()) if _value(m[0]) == answer]


def _slips(right: Decimal, count: int) -> list[Decimal]:
    """Results with one digit of the right one off, in a fixed order; at least `count` if there are so many."""
    text = format(right.normalize(), "f")
    significant = len(text) if "." in text else len(text.rstrip("0"))
    wrong: list[Decimal] = []
    for deltas in SLIPS:
        for place, delta in ((p, d) for p in range(significant) if text[p] != "." for d in deltas):
            digit = int(text[place]) + delta
            at_an_end = place == significant - 1 or (place == 0 and text[1:2] != ".")
            if digit > 9 or digit < (1 if at_an_end else 0):
                continue
            wrong.append(Decimal(f"{text[:place]}{digit}{text[place + 1 :]}"))
        if len(wrong) >= count:
            break
    return wrong


def _replaced(text: str, spans: Sequence[tuple[int, int]], number: Decimal) -> str:
    """The text with a number in place of those at `spans`, each written as the old one was (commas, decimals)."""
    for start, stop in reversed(spans):
        old = text[start:stop]
        places = len(old.partition(".")[2])
        text = text[:start] + format(number, f"{',' if ',' in old else ''}.{places}f") + text[stop:]
    return text


def _value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def _templates_in_turn(examples: Sequence[Example], seed: int) -> list[Example]:
    """One of each template, then a second of each, ...: a short list covers as many templates as it can."""
    groups: dict[str, list[Example]] = {}
    for example in sorted(examples, key=lambda e: e.id):
        groups.setdefault(example.group, []).append(example)
    turns: list[tuple[int, float, Example]] = []
    for name in sorted(groups):
        rng = _random(seed, "turn", name)
        place = rng.random()
        turns += [(turn, place, e) for turn, e in enumerate(rng.sample(groups[name], len(groups[name])))]
    return [e for _, _, e in sorted(turns, key=lambda t: t[:2])]


def _choose(example: Example, wrong: Sequence[str], rng: random.Random) -> Document:
    choices = [example.reference, *wrong]
    rng.shuffle(choices)
    return {
        "id": example.id,
        "group": example.group,
        "question": example.prompt,
        "choices": choices,
        "gold": choices.index(example.reference),
    }


def _random(seed: int, what: str, name: str) -> random.Random:
    return random.Random(f"{seed} {what} {name}")  # a string seeds by its sha512, whatever PYTHONHASHSEED is
