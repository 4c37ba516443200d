"""Each document's own result of a finished evaluation, as arrays: what paired intervals and tests are made of."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import numpy.typing

from hfsd.errors import HfsdError
from hfsd.findings import EvalRow

Array = numpy.typing.NDArray[Any]
Key = tuple[str, str, str]  # task, metric, filter
Document = tuple[str, str, str]  # task (of a group: its own one), id, hash

TOLERANCE = 1e-6  # between the score that lm-eval reports and the one that its documents give
# lm-eval's metrics that divide sums over documents, [sum, weight] each, and what is made of the ratio
RATIOS: dict[str, Callable[[Array], Array]] = {
    "bits_per_byte": lambda ratio: -ratio / math.log(2),
    "byte_perplexity": lambda ratio: numpy.exp(-ratio),
    "word_perplexity": lambda ratio: numpy.exp(-ratio),
}


@dataclass(frozen=True)
class Answered:
    """One task, metric and filter: every variant's result on the same documents, in one order.

    The score is that of `sums.sum() / weights.sum()`; a plain metric has weights of 1. Both are by variant id and of
    shape (documents,). Documents are ordered by task, id and hash, so that tasks that ask the same ones line up.
    """

    metric: str
    documents: tuple[Document, ...]
    sums: dict[str, Array]
    weights: dict[str, Array]

    def score(self, sums: Array, weights: Array) -> Array:
        """The metric, in the task's own unit, of sums over documents."""
        return RATIOS.get(self.metric, numpy.asarray)(sums / weights)

    def value(self, variant: str) -> float:
        """A variant's score over all documents."""
        return float(self.score(self.sums[variant].sum(), self.weights[variant].sum()))

    def same_documents(self, other: Answered) -> bool:
        """Whether both ask the same documents: equal hashes, or equal ids that are more than a row's number."""
        if len(self.documents) != len(other.documents):
            return False
        if [d[2] for d in self.documents] == [d[2] for d in other.documents]:
            return True
        ids = [d[1] for d in self.documents]
        return ids == [d[1] for d in other.documents] and not all(i.isdecimal() for i in ids)


def line(variant: str, task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """What TASK.docs.jsonl keeps of one of lm-eval's samples.

    Raises:
        HfsdError: a number of it is not finite; it would come out the same again.
    """
    name, responses = str(sample["doc"].get("id", sample["doc_id"])), sample["filtered_resps"]
    metrics = {metric: sample[metric] for metric in sample["metrics"]}
    for what, value in [*metrics.items(), *(("a response", response) for response in responses)]:
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise HfsdError(
                    f"{task} on {variant}: {what} of document {name} is {number}, which is no score; try another "
                    "model.dtype (float32 holds the largest numbers), or leave the task out"
                )
    return {
        "task": task,
        "id": name,
        "hash": sample["doc_hash"],
        "filter": sample["filter"],
        "metrics": metrics,
        "responses": [response[0] if _is_likelihood(response) else response for response in responses],
    }


def _is_likelihood(response: Any) -> bool:
    """A log-likelihood comes with whether the text is what the model would write; several texts are a list too."""
    return isinstance(response, list | tuple) and len(response) == 2 and isinstance(response[1], bool)


def read(root: Path, rows: Sequence[EvalRow]) -> dict[Key, Answered]:
    """The documents behind the scores, from ROOT/evaluate/VARIANT/DOC_FILE.

    Left out are a task, metric and filter whose documents do not give the reported score of every variant (to 1e-6):
    it is no mean over documents then, such as F1, and has no interval rather than a wrong one.

    Args:
        root: the run directory.
        rows: scores of all variants.

    Raises:
        HfsdError: a variant has no documents, or others than the original, or in another order.
    """
    files: dict[Path, list[dict[str, Any]]] = {}
    table: dict[Key, dict[str, EvalRow]] = {}
    for row in rows:
        table.setdefault((row.task, row.metric, row.filter), {})[row.variant.id] = row
        path = _path(root, row)
        if path not in files:
            files[path] = _lines(path)
    found = {}
    for key, scored in table.items():
        parts = {v: _of(files[_path(root, row)], key) for v, row in scored.items()}
        answered = collect(key, parts)
        if answered and _reproduced(answered, scored):
            found[key] = answered
    return found


def collect(key: Key, parts: Mapping[str, Sequence[tuple[Document, Any]]]) -> Answered | None:
    """The arrays of one task, metric and filter; None where a document's metric is no number (or ratio of sums).

    Args:
        key: task, metric and filter.
        parts: per variant id, its documents in the order of their evaluation, each with its metric.

    Raises:
        HfsdError: a variant has no documents, or others than the first one, or in another order.
    """
    first, expected = "", []
    for variant, pairs in parts.items():
        documents = [document for document, _ in pairs]
        if not documents:
            raise HfsdError(f"{key[0]} ({key[1]}, {key[2]}): {variant} has no documents; evaluate it again")
        if not first:
            first, expected = variant, documents
        _same(key[0], first, expected, variant, documents)
    order = sorted(range(len(expected)), key=lambda i: expected[i])
    sums, weights = {}, {}
    for variant, pairs in parts.items():
        numbers = [_number(key[1], metric) for _, metric in pairs]
        if any(n is None for n in numbers):
            return None
        both = numpy.array(numbers, dtype=float)[order]
        sums[variant], weights[variant] = both[:, 0].copy(), both[:, 1].copy()
    return Answered(key[1], tuple(expected[i] for i in order), sums, weights)


def _path(root: Path, row: EvalRow) -> Path:
    return root / "evaluate" / row.variant.id / row.doc_file


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise HfsdError(f"{path.parent.name} has no documents: {path} is not there; evaluate it again")
    found = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError as error:
                where = f"{path}, line {number}"
                raise HfsdError(f"{where}: no JSON ({error}); evaluate {path.parent.name} again") from error
    return found


def _of(lines: Iterable[Mapping[str, Any]], key: Key) -> list[tuple[Document, Any]]:
    _, metric, filter_name = key
    mine = (line for line in lines if line["filter"] == filter_name and metric in line["metrics"])
    return [((line["task"], line["id"], line["hash"]), line["metrics"][metric]) for line in mine]


def _same(task: str, first: str, expected: Sequence[Document], variant: str, documents: Sequence[Document]) -> None:
    if documents == expected:
        return
    what = f"{len(expected)} documents of {first}, {len(documents)} of {variant}"
    if len(documents) == len(expected):
        at = next(i for i, (a, b) in enumerate(zip(expected, documents, strict=True)) if a != b)
        (_, one, hash_one), (_, two, hash_two) = expected[at], documents[at]
        texts = f" of another text ({hash_one[:8]}, {hash_two[:8]})" if one == two else ""
        what = f"document {at} (from 0) is {one} of {first} and {two} of {variant}{texts}"
    raise HfsdError(f"{task}: {what}; variants are compared on the same documents in one order: evaluate both again")


def _number(metric: str, value: Any) -> tuple[float, float] | None:
    if isinstance(value, int | float):  # True and False are numbers too
        return float(value), 1.0
    if metric in RATIOS and isinstance(value, list | tuple) and len(value) == 2:
        return float(value[0]), float(value[1])
    return None


def _reproduced(answered: Answered, scored: Mapping[str, EvalRow]) -> bool:
    if any(not answered.weights[v].sum() for v in scored):
        return False
    gaps = (abs(answered.value(v) - row.value) / max(1.0, abs(row.value)) for v, row in scored.items())
    return all(gap <= TOLERANCE for gap in gaps)
