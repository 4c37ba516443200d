"""Scan: d(start, width) for every range of blocks in one pass, and the choice of the range to remove.

Sources: angular distance, arXiv 2403.17887 (used by arXiv 2410.09982); block influence, ShortGPT, arXiv 2403.03853.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from hfsd import data, models, surgery
from hfsd.errors import BadRequest, HfsdError
from hfsd.progress import track
from hfsd.recipe import Scan as ScanRecipe
from hfsd.records import BlockScores, Candidate, Example, ModelRef, Scan

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

TOKEN_CHOICES = ("all", "last")


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    recipe: ScanRecipe,
    blocks: int,
    ref: ModelRef,
) -> Scan:
    """Scores every range and chooses which `blocks` blocks to remove.

    Args:
        rows: calibration rows; the first `recipe.verify_rows` are kept apart to verify candidates on.
        blocks: width of the range to choose.

    Raises:
        BadRequest: too few rows, or more blocks than the model has.
        HfsdError: the residual stream is not finite, or zero.
    """
    start = time.perf_counter()
    n_layers = len(models.decoder_blocks(model)[1])
    if not 0 < blocks < n_layers:
        raise BadRequest(f"prune.blocks is {blocks}; this model has {n_layers} blocks, so 1 to {n_layers - 1} can go")
    verify, scored = rows[: recipe.verify_rows], rows[recipe.verify_rows : recipe.verify_rows + recipe.rows]
    if not scored:
        raise BadRequest(
            f"scan: {len(rows)} calibration rows, and scan.verify_rows takes {recipe.verify_rows}; lower it"
        )
    scores = score(model, batches(tokenizer, scored, recipe, model.device), len(scored), recipe.metric)
    held_out = list(batches(tokenizer, verify, recipe, model.device))
    if recipe.select == "lowest":
        values = scores[recipe.tokens].values[blocks]
        first = min(range(len(values)), key=values.__getitem__)
        why = f"lowest {recipe.metric} distance over {recipe.tokens} tokens"
        candidates: list[Candidate] = []
        original_loss = loss(model, held_out)
    else:
        proposals = _proposals(scores, blocks, n_layers, recipe.candidates)
        original_loss, candidates = _verify(model, held_out, proposals, blocks)
        best = min(candidates, key=lambda c: (c.loss, c.start))
        first, why = best.start, f"least held-out loss of {len(candidates)} candidates (proposed by {best.proposed_by})"
    plan = surgery.plan_removing(n_layers, first, first + blocks, why)
    return Scan(scores, candidates, original_loss, plan, ref, round(time.perf_counter() - start, 3))


def batches(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[Example], recipe: ScanRecipe, device: Any
) -> Iterator[Batch]:
    """Right-padded batches of conversations in the chat template: ids, attention mask, text mask; each [B, T].

    The text mask marks tokens of the prompt and of the reference: template and special tokens never count.
    """
    import torch

    encoded = sorted((_encode(tokenizer, row, recipe.max_length) for row in rows), key=lambda e: -len(e[0]))
    for chunk in _by_tokens(encoded, recipe.batch_tokens):
        width = len(chunk[0][0])
        ids = torch.full((len(chunk), width), int(tokenizer.pad_token_id))  # [B, T]
        seen = torch.zeros(len(chunk), width, dtype=torch.long)  # [B, T]
        text = torch.zeros(len(chunk), width, dtype=torch.bool)  # [B, T]
        for i, (tokens, is_text) in enumerate(chunk):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            seen[i, : len(tokens)] = 1
            text[i, : len(tokens)] = torch.tensor(is_text)
        yield ids.to(device), seen.to(device), text.to(device)


def score(model: PreTrainedModel, data_batches: Iterator[Batch], samples: int, metric: str) -> dict[str, BlockScores]:
    """One pass over the batches: scores of all ranges, under both token choices.

    `angular` is arccos(cos(h_l, h_{l+n})) / pi between the streams that enter block l and block l+n. `bi` is the sum
    of 1 - cos over the single blocks of the range. The stream after the last block is taken before the final norm. Sums
    run in float64, so the mean depends on the batching no more than the forward pass does; memory is that of one batch.

    Returns:
        Token choice (`all`, `last`) -> scores.
    """
    import torch

    _, blocks = models.decoder_blocks(model)
    size = len(blocks) + 1
    sums = {choice: torch.zeros(size, size, dtype=torch.float64) for choice in TOKEN_CHOICES}
    counts = dict.fromkeys(TOKEN_CHOICES, 0)
    with torch.inference_mode(), track("scan", samples, "sequences") as advance, _Streams(blocks) as streams:
        for ids, seen, text in data_batches:
            model.base_model(input_ids=ids, attention_mask=seen, use_cache=False)  # the head is not needed
            last = _last_only(text)
            h = torch.stack([s[text] for s in streams.taken], dim=1).float()  # [N, L+1, D]
            distance = _distances(h, metric)  # [N, L+1, L+1]
            for choice, rows in (("all", slice(None)), ("last", last[text])):
                sums[choice] += distance[rows].sum(0).cpu()
                counts[choice] += len(distance[rows])
            advance(len(ids))
    return {c: _scores(sums[c] / counts[c], metric, c, samples, counts[c]) for c in TOKEN_CHOICES}


def loss(model: PreTrainedModel, held_out: Sequence[Batch]) -> float:
    """Mean next-token loss, in nats, over the text tokens of the batches."""
    import torch
    import torch.nn.functional as F

    total, count = 0.0, 0
    with torch.inference_mode():
        for ids, seen, text in held_out:
            logits = model(input_ids=ids, attention_mask=seen, use_cache=False).logits  # [B, T, V]
            wanted = text[:, 1:]  # [B, T-1]
            nats = F.cross_entropy(logits[:, :-1][wanted].float(), ids[:, 1:][wanted], reduction="sum")
            total, count = total + nats.item(), count + int(wanted.sum())
    return total / count


class _Streams:
    """Keeps the streams that enter each block, and the one that leaves the last, of the latest forward pass."""

    def __init__(self, blocks: Any) -> None:
        self.blocks, self.taken, self._hooks = blocks, [], []  # type: ignore[var-annotated]

    def __enter__(self) -> _Streams:
        def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], first: bool) -> None:
            if first:
                self.taken.clear()
            self.taken.append(args[0] if args else kwargs["hidden_states"])

        def leaves(_: Any, __: Any, output: Any) -> None:
            self.taken.append(output[0] if isinstance(output, tuple) else output)

        for i, block in enumerate(self.blocks):
            hook = block.register_forward_pre_hook(lambda m, a, k, i=i: enters(m, a, k, i == 0), with_kwargs=True)
            self._hooks.append(hook)
        self._hooks.append(self.blocks[-1].register_forward_hook(leaves))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.taken.clear()


def _distances(h: torch.Tensor, metric: str) -> torch.Tensor:
    """[N, L+1, D] -> [N, L+1, L+1] in float64: angles over pi, or 1 - cos."""
    import torch

    norms = h.norm(dim=-1, keepdim=True)  # [N, L+1, 1]
    if not bool(torch.isfinite(norms).all()) or not bool((norms > 0).all()):
        raise HfsdError(
            "scan: a hidden state is NaN, infinite or zero; try model.dtype: float32 or check the checkpoint"
        )
    unit = h / norms
    cos = (unit @ unit.transpose(1, 2)).double().clamp(-1, 1)  # [N, L+1, L+1]
    return 1 - cos if metric == "bi" else cos.arccos() / torch.pi


def _scores(mean: torch.Tensor, metric: str, tokens: str, samples: int, n_tokens: int) -> BlockScores:
    n_layers = len(mean) - 1
    if metric == "bi":
        single = [mean[i, i + 1].item() for i in range(n_layers)]
        values = {w: [sum(single[s : s + w]) for s in range(n_layers - w + 1)] for w in range(1, n_layers)}
    else:
        values = {w: [mean[s, s + w].item() for s in range(n_layers - w + 1)] for w in range(1, n_layers)}
    return BlockScores(metric, tokens, samples, n_tokens, values)


def _proposals(scores: dict[str, BlockScores], width: int, n_layers: int, k: int) -> dict[int, str]:
    """Start -> who proposed it: the k best under each token choice, and the deepest range but the last block."""
    found: dict[int, list[str]] = {}
    for choice in TOKEN_CHOICES:
        values = scores[choice].values[width]
        for first in sorted(range(len(values)), key=values.__getitem__)[:k]:
            found.setdefault(first, []).append(f"{choice} tokens")
    found.setdefault(max(0, n_layers - 1 - width), []).append("deepest but the last")
    return {first: ", ".join(names) for first, names in sorted(found.items())}


def _verify(
    model: PreTrainedModel, held_out: Sequence[Batch], proposals: dict[int, str], width: int
) -> tuple[float, list[Candidate]]:
    """Held-out loss of the original and of each proposed cut, each measured on a view of the same weights."""
    n_layers = len(models.decoder_blocks(model)[1])
    with track("verify", len(proposals) + 1, "cuts") as advance:
        original_loss = loss(model, held_out)
        advance()
        candidates = []
        for first, proposed_by in proposals.items():
            plan = surgery.plan_removing(n_layers, first, first + width, proposed_by)
            found = loss(surgery.view(model, plan.kept), held_out)
            candidates.append(Candidate(first, first + width, found, proposed_by))
            advance(note=f"[{first}, {first + width}) loss {found:.3f}")
    return original_loss, candidates


def _encode(tokenizer: PreTrainedTokenizerBase, row: Example, max_length: int) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them are text: those that lie within the prompt or the reference."""
    if tokenizer.chat_template:
        head = data.render(tokenizer, data.prompt_messages(row.prompt))
    else:
        head = f"{row.prompt}\n\n"
    whole = head + row.reference
    begin = head.find(row.prompt)
    spans = [(len(head), len(whole))] + ([(begin, begin + len(row.prompt))] if begin >= 0 else [])
    encoded = tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, truncation=True, max_length=max_length
    )
    is_text = [a < b and any(a >= start and b <= stop for start, stop in spans) for a, b in encoded["offset_mapping"]]
    if not any(is_text):
        raise BadRequest(f"scan: row {row.id} has no text token within scan.max_length {max_length}; raise it")
    return list(encoded["input_ids"]), is_text


def _by_tokens(
    encoded: Sequence[tuple[list[int], list[bool]]], budget: int
) -> Iterator[list[tuple[list[int], list[bool]]]]:
    """Chunks of a list sorted by falling length whose padded size stays within the budget (one row may exceed it)."""
    at = 0
    while at < len(encoded):
        count = max(1, budget // len(encoded[at][0]))
        yield list(encoded[at : at + count])
        at += count


def _last_only(text: torch.Tensor) -> torch.Tensor:
    """[B, T] bool -> [B, T] bool with only the last true position of each row."""
    import torch

    positions = torch.arange(text.shape[1], device=text.device)
    last = (text * positions).argmax(dim=1)  # [B]
    return (positions == last[:, None]) & text
