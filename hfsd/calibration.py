"""Calibration text -> token sequences that know which of their tokens are text -> padded batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from hfsd import chat
from hfsd.data import Passage
from hfsd.errors import BadRequest
from hfsd.records import Message

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class Tokens(NamedTuple):
    """One sequence. `is_text` marks what its author wrote: template and special tokens never count."""

    ids: list[int]
    is_text: list[bool]


class Batch(NamedTuple):
    """Right-padded sequences, each [B, T]: token ids, attention mask, text mask."""

    ids: torch.Tensor
    seen: torch.Tensor
    text: torch.Tensor


def sequences(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage], count: int, max_length: int
) -> list[Tokens]:
    """The first `count` sequences of at most `max_length` tokens.

    A conversation is one sequence, in the chat template, cut off at the end. A raw text is as many as it fills, one
    after another, without a template.

    Raises:
        BadRequest: no passage has a text token, or the tokenizer does not tell where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise BadRequest("calibration needs a fast tokenizer (tokenizer.json), which tells where its tokens lie")
    found: list[Tokens] = []
    for passage in passages:
        if len(found) >= count:
            break
        if isinstance(passage, str):
            made = _raw(tokenizer, passage, max_length)
        else:
            made = [_conversation(tokenizer, passage, max_length)]
        found += [s for s in made if any(s.is_text)]
    if not found:
        raise BadRequest(f"no usable text in {len(passages)} calibration passages (within {max_length} tokens of each)")
    return found[:count]


def batches(tokenizer: PreTrainedTokenizerBase, chosen: Sequence[Tokens], budget: int, device: Any) -> Iterator[Batch]:
    """Batches of at most `budget` tokens, padding included (one sequence may exceed it), longest first."""
    import torch

    ordered = sorted(chosen, key=lambda s: -len(s.ids))
    at = 0
    while at < len(ordered):
        width = len(ordered[at].ids)
        chunk = ordered[at : at + max(1, budget // width)]
        at += len(chunk)
        ids = torch.full((len(chunk), width), int(tokenizer.pad_token_id))  # [B, T]
        seen = torch.zeros(len(chunk), width, dtype=torch.long)  # [B, T]
        text = torch.zeros(len(chunk), width, dtype=torch.bool)  # [B, T]
        for i, (tokens, is_text) in enumerate(chunk):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            seen[i, : len(tokens)] = 1
            text[i, : len(tokens)] = torch.tensor(is_text)
        yield Batch(ids.to(device), seen.to(device), text.to(device))


def _raw(tokenizer: PreTrainedTokenizerBase, text: str, max_length: int) -> list[Tokens]:
    """Windows over a text, each behind the token that this tokenizer puts first, if it puts one."""
    first = tokenizer("")["input_ids"][:1]
    head = first if first == [tokenizer.bos_token_id] else []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    step = max(1, max_length - len(head))
    windows = [ids[at : at + step] for at in range(0, len(ids), step)]
    return [Tokens(head + w, [False] * len(head) + [True] * len(w)) for w in windows]


def _conversation(tokenizer: PreTrainedTokenizerBase, messages: list[Message], max_length: int) -> Tokens:
    """A conversation in the chat template; its text is what lies within the messages' contents."""
    whole = chat.transcript(tokenizer, messages)
    spans = _spans(tokenizer, messages, whole)
    encoded = tokenizer(
        whole,
        add_special_tokens=not tokenizer.chat_template,  # a template brings its own
        return_offsets_mapping=True,
        truncation=True,
        max_length=max_length,
    )
    is_text = [a < b and any(a >= start and b <= stop for start, stop in spans) for a, b in encoded["offset_mapping"]]
    return Tokens(list(encoded["input_ids"]), is_text)


def _spans(tokenizer: PreTrainedTokenizerBase, messages: list[Message], whole: str) -> list[tuple[int, int]]:
    """Where the messages' contents lie in their transcript, in characters.

    The template is written around marks first: what stands between them is its own, whatever the contents say.
    """
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]  # of a private area: in no text and in no template
    marked = chat.transcript(tokenizer, [{**m, "content": mark} for m, mark in zip(messages, marks, strict=True)])
    spans, at = [], 0
    for message, mark in zip(messages, marks, strict=True):
        before, found, marked = marked.partition(mark)
        content = message["content"].strip()  # many templates strip it
        if not found or not content:
            continue
        if whole.startswith(before, at):
            at += len(before)
        begin = whole.find(content, at)
        if begin >= 0:
            at = begin + len(content)
            spans.append((begin, at))
    return spans
