"""Which rows are trained on, and in which order: from the seed and the rows of every text, so that arms cannot differ.

The order of all epochs is laid out before a model is loaded, and a trainer reads it from the first row to the last:
it is known, it is equal for every arm on any number of processes, and a resumed run finds its place in it.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import chat
from hfsd.errors import BadRequest, HfsdError, Refusal

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

STRATEGIES = ("group_by_length", "random", "sequential")


@dataclass(frozen=True)
class Rows:
    """The rows of one data set that fit in every text, with the same ids in the same order.

    `tables` holds per text the columns id, prompt and completion as TRL takes them; `lengths` and `trained` count each
    row's tokens and those of its completion; `left_out` counts rows that are too long in one of the texts.
    """

    tables: dict[str, Dataset]
    lengths: dict[str, list[int]]
    trained: dict[str, list[int]]
    left_out: int

    def __len__(self) -> int:
        return len(next(iter(self.lengths.values())))


@dataclass(frozen=True)
class Pace:
    """How much is trained: `epochs` over the rows, or `max_steps` steps of `per_step` rows where that is above 0."""

    per_step: int
    epochs: float
    max_steps: int
    strategy: str
    budget: str
    seed: int


def read(data: Mapping[str, Path], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
    """The rows that fit into `max_length` tokens in every text.

    Args:
        data: text -> its parquet file, in TRL's conversational prompt/completion form.

    Raises:
        Refusal: the texts hold other rows, or another order.
        HfsdError: no row is left.
    """
    import datasets
    from pyarrow import parquet

    raw = {text: parquet.read_table(path).to_pylist() for text, path in data.items()}
    ids = [[row["id"] for row in table] for table in raw.values()]
    if any(other != ids[0] for other in ids):
        raise Refusal("the arms' training sets hold other rows or another order; make them again with --redo rewrite")
    if not ids[0]:
        raise HfsdError("train: the training set is empty; make it again with --redo rewrite")
    tables = {text: datasets.Dataset.from_list(_for_trl(table, tokenizer)) for text, table in raw.items()}
    counts = {text: [_count(row, tokenizer) for row in table] for text, table in tables.items()}
    kept = [i for i in range(len(ids[0])) if all(c[i][0] <= max_length for c in counts.values())]
    if not kept:
        raise HfsdError(
            f"train: none of {len(ids[0])} rows is within train.sft.max_length {max_length} tokens; raise it"
        )
    left_out = len(ids[0]) - len(kept)
    if left_out:
        print(
            f"train: {left_out} of {len(ids[0])} rows exceed {max_length} tokens in an arm: left out of all",
            file=sys.stderr,
        )
    return Rows(
        {text: table.select(kept) for text, table in tables.items()},
        {text: [c[i][0] for i in kept] for text, c in counts.items()},
        {text: [c[i][1] for i in kept] for text, c in counts.items()},
        left_out,
    )


def order(rows: Rows, pace: Pace) -> list[int]:
    """Row numbers in the order of training, every epoch's, equal for all texts, in whole steps.

    Rows of like length stand together, by the longest of a row's texts: what an arm's own lengths would group
    differently would no longer be the same order. The last step is filled up from the start: of a partial one, several
    processes would train on other rows than one does.
    """
    if pace.strategy not in STRATEGIES:
        raise BadRequest(f"train.sft.train_sampling_strategy is {pace.strategy!r}; it is {', '.join(STRATEGIES)}")
    whole = max(1, round(pace.epochs * len(rows)))
    total = pace.max_steps * pace.per_step if pace.max_steps > 0 else whole
    longest = [max(row) for row in zip(*rows.lengths.values(), strict=True)]
    found: list[int] = []
    epoch = 0
    while len(found) < total:
        found += _epoch(longest, pace, pace.seed + epoch)
        epoch += 1
    found = found[:total]
    return [*found, *itertools.islice(itertools.cycle(found), -total % pace.per_step)]


def within_budget(rows: Rows, order: Sequence[int], text: str, pace: Pace) -> list[int]:
    """The part of the order that an arm of this text is trained on.

    `rows`: all of it. `tokens`: up to as many trained completion tokens as the text with the fewest has, to the nearest
    step.
    """
    if pace.budget == "rows":
        return list(order)
    target = min(sum(trained[i] for i in order) for trained in rows.trained.values())
    sums = list(itertools.accumulate((rows.trained[text][i] for i in order), initial=0))
    ends = range(pace.per_step, len(order) + 1, pace.per_step)
    return list(order[: min(ends, key=lambda end: abs(sums[end] - target))])


def _epoch(lengths: Sequence[int], pace: Pace, seed: int) -> list[int]:
    import torch
    from transformers.trainer_pt_utils import get_length_grouped_indices

    generator = torch.Generator().manual_seed(seed)
    if pace.strategy == "sequential":
        return list(range(len(lengths)))
    if pace.strategy == "random":
        return torch.randperm(len(lengths), generator=generator).tolist()
    return list(get_length_grouped_indices(list(lengths), pace.per_step, generator=generator))


def _for_trl(table: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    return [
        {"id": row["id"], **chat.trainable(tokenizer, row["prompt"], row["completion"][0]["content"])} for row in table
    ]


def _count(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Tokens of a row, and those of its completion, as SFTTrainer counts them: from where prompt and whole part."""
    if isinstance(row["prompt"], str):
        eos = "" if row["completion"].endswith(tokenizer.eos_token) else tokenizer.eos_token
        head, whole = (
            tokenizer(text)["input_ids"] for text in (row["prompt"], f"{row['prompt']}{row['completion']}{eos}")
        )
    else:
        head = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    common = next((i for i, (a, b) in enumerate(zip(head, whole, strict=False)) if a != b), min(len(head), len(whole)))
    return len(whole), len(whole) - common
