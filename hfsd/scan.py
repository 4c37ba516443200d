"""Scan: d(start, width) for every range of blocks in one pass, and the choice of the blocks to remove.

Sources: angular distance, arXiv 2403.17887 (used by arXiv 2410.09982); block influence, ShortGPT, arXiv 2403.03853;
greedy removal by loss, SLEB, arXiv 2402.09025.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import calibration, figures, models, processes, surgery
from hfsd.blocks import as_range
from hfsd.blocks_cut import Scan as ScanRecipe
from hfsd.calibration import Batch
from hfsd.data import Passage
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.plain import dumps
from hfsd.progress import track
from hfsd.records import BlockScores, Candidate, ModelRef, PrunePlan, Scan
from hfsd.rundir import write_atomic
from hfsd.verify import Blocks, Verifier

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKEN_CHOICES = ("all", "last")
CHUNK = 256  # tokens whose distances are computed at once: bounds the memory of wide models


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    passages: Sequence[Passage],
    recipe: ScanRecipe,
    blocks: int,
    ref: ModelRef,
) -> Scan:
    """Scores every range and chooses which `blocks` blocks to remove.

    Args:
        passages: calibration text; the first `recipe.verify_rows` sequences of it are kept apart to verify candidates.
        blocks: how many blocks to remove.

    Raises:
        BadRequest: too little text, or more blocks than the model has.
        Refusal: no cut of that many blocks is sound.
        HfsdError: the residual stream is not finite, or zero.
    """
    start = time.perf_counter()
    n_layers = len(models.decoder_blocks(model)[1])
    if not 0 < blocks < n_layers:
        raise BadRequest(f"prune.blocks is {blocks}; this model has {n_layers} blocks, so 1 to {n_layers - 1} can go")
    config = model.config.to_dict()
    _check_widths(recipe, n_layers)
    ranges = _sound_ranges(config, n_layers, blocks) if recipe.search == "contiguous" else []
    held_out, scored = _sequences(tokenizer, passages, recipe)
    scores = score(model, _batches(tokenizer, scored, recipe, model), len(scored), recipe.metric)
    with Verifier(model, list(_batches(tokenizer, held_out, recipe, model))) as verifier:
        if recipe.search == "greedy":
            original_loss, candidates = _greedy(verifier, config, n_layers, blocks)
            removed, why = candidates[-1].removed, f"greedy search by held-out loss, {blocks} blocks one at a time"
        elif recipe.select == "lowest":
            original_loss, candidates = verifier.losses()[0], []
            removed = min(ranges, key=lambda r: scores[recipe.tokens].values[blocks][r[0]])
            why = f"lowest {recipe.metric} distance over {recipe.tokens} tokens"
        else:
            few = _batches(tokenizer, held_out[: recipe.screen_rows], recipe, model)
            screened = verifier.losses(ranges, on=list(few))[1] if recipe.screen_rows else None
            proposals = _proposals(scores, screened, ranges, recipe.candidates)
            original_loss, losses = verifier.losses(list(proposals))
            found = zip(proposals.items(), losses, strict=True)
            candidates = [Candidate(cut, loss, by) for (cut, by), loss in found if math.isfinite(loss)]
            best = min(candidates, key=lambda c: (c.loss, c.removed))
            removed = best.removed
            why = f"least held-out loss of {len(candidates)} candidates (proposed by {best.proposed_by})"
    plan = surgery.plan_keeping(n_layers, _without(removed, n_layers), why)
    plan = _with_scores(plan, scores, candidates, original_loss)
    return Scan(_reported(scores, recipe), candidates, original_loss, plan, ref, round(time.perf_counter() - start, 3))


def scores_only(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage], recipe: ScanRecipe
) -> dict[str, BlockScores]:
    """The scores of every range, under both token choices, and no choice of a cut: all sequences are scored."""
    _check_widths(recipe, len(models.decoder_blocks(model)[1]))
    chosen = calibration.sequences(tokenizer, passages, recipe.rows, recipe.max_length)
    found = score(model, _batches(tokenizer, chosen, recipe, model), len(chosen), recipe.metric)
    return _reported(found, recipe)


def write(scores: dict[str, BlockScores], tokens: str, out: Path, scan: Scan | None = None) -> None:
    """scores.json (those under one token choice) and their heat map; of a whole scan also scan.json and the losses."""
    write_atomic(out / "scores.json", dumps(scores[tokens]))
    if scan is not None:
        write_atomic(out / "scan.json", dumps(scan))
    figures.draw_scan(scores[tokens], scan, out)


def score(model: PreTrainedModel, batches: Iterable[Batch], samples: int, metric: str) -> dict[str, BlockScores]:
    """One pass over the batches: scores of all ranges, under both token choices.

    `angular` is arccos(cos(h_l, h_{l+n})) / pi between the streams that enter block l and block l+n. `bi` is the sum
    of 1 - cos over the single blocks of the range. The stream after the last block is taken before the final norm. Sums
    run in float64, so the mean depends on the batching no more than the forward pass does; memory is that of one batch.
    The processes of a launcher share the batches, and each gets the same result to the last bit.

    Args:
        samples: number of sequences in the batches.

    Returns:
        Token choice (`all`, `last`) -> scores.
    """
    import torch

    _, blocks = models.decoder_blocks(model)
    size = len(blocks) + 1
    sums = {choice: torch.zeros(size, size, dtype=torch.float64) for choice in TOKEN_CHOICES}
    counts = dict.fromkeys(TOKEN_CHOICES, 0)
    with torch.inference_mode(), track("scan", samples, "sequences") as advance, _Streams(blocks) as streams:
        for found, rows in processes.spread(lambda b: (_of_batch(model, streams, b, metric), len(b.ids)), batches):
            for choice, (total, count) in found.items():
                sums[choice] += total
                counts[choice] += count
            advance(rows)
    return {c: _scores(sums[c] / counts[c], metric, c, samples, counts[c]) for c in TOKEN_CHOICES}


class _Streams:
    """Keeps, of one forward pass, the chosen tokens' streams that enter each block and that leave the last one."""

    def __init__(self, blocks: Any) -> None:
        self.blocks, self.taken, self._hooks = blocks, [], []  # type: ignore[var-annotated]
        self.chosen: torch.Tensor | None = None  # [B, T] bool

    def __enter__(self) -> _Streams:
        def enters(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._take(args[0] if args else kwargs["hidden_states"])

        def leaves(_: Any, __: Any, output: Any) -> None:
            self._take(output[0] if isinstance(output, tuple) else output)

        self._hooks = [block.register_forward_pre_hook(enters, with_kwargs=True) for block in self.blocks]
        self._hooks.append(self.blocks[-1].register_forward_hook(leaves))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self.taken.clear()

    def _take(self, stream: torch.Tensor) -> None:
        assert self.chosen is not None
        kept = stream[self.chosen.to(stream.device)]  # [N, D]
        self.taken.append(kept.to(self.chosen.device))


def _of_batch(
    model: PreTrainedModel, streams: _Streams, batch: Batch, metric: str
) -> dict[str, tuple[torch.Tensor, int]]:
    """Token choice -> summed distances [L+1, L+1] over the batch's tokens, and how many tokens they are."""
    import torch

    streams.taken.clear()
    streams.chosen = batch.text
    model.base_model(input_ids=batch.ids, attention_mask=batch.seen, use_cache=False)  # the head is not needed
    last = _last_only(batch.text)[batch.text]  # [N]
    size = len(streams.taken)
    sums = {choice: torch.zeros(size, size, dtype=torch.float64) for choice in TOKEN_CHOICES}
    for at in range(0, len(last), CHUNK):
        h = torch.stack([s[at : at + CHUNK] for s in streams.taken], dim=1)  # [n, L+1, D]
        distance = _distances(h, metric)  # [n, L+1, L+1]
        sums["all"] += distance.sum(0).cpu()
        sums["last"] += distance[last[at : at + CHUNK]].sum(0).cpu()
    streams.taken.clear()
    return {"all": (sums["all"], len(last)), "last": (sums["last"], int(last.sum()))}


def _distances(h: torch.Tensor, metric: str) -> torch.Tensor:
    """[N, L+1, D] -> [N, L+1, L+1]: angles over pi, or 1 - cos. A float32 cosine near 1 would be 1e-4 off in angle."""
    import torch

    h = h.to(torch.float32 if h.device.type == "mps" else torch.float64)  # MPS has no float64
    norms = h.norm(dim=-1, keepdim=True)  # [N, L+1, 1]
    if not bool(torch.isfinite(norms).all()) or not bool((norms > 0).all()):
        raise HfsdError(
            "scan: a hidden state is NaN, infinite or zero; try model.dtype: float32 or check the checkpoint"
        )
    unit = h / norms
    cos = (unit @ unit.transpose(1, 2)).clamp(-1, 1)  # [N, L+1, L+1]
    return 1 - cos if metric == "bi" else cos.arccos() / torch.pi


def _scores(mean: torch.Tensor, metric: str, tokens: str, samples: int, n_tokens: int) -> BlockScores:
    n_layers = len(mean) - 1
    if metric == "bi":
        single = [mean[i, i + 1].item() for i in range(n_layers)]
        values = {w: [sum(single[s : s + w]) for s in range(n_layers - w + 1)] for w in range(1, n_layers)}
    else:
        values = {w: [mean[s, s + w].item() for s in range(n_layers - w + 1)] for w in range(1, n_layers)}
    return BlockScores(metric, tokens, samples, n_tokens, values)


def _sequences(
    tokenizer: PreTrainedTokenizerBase, passages: Sequence[Passage], recipe: ScanRecipe
) -> tuple[list[calibration.Tokens], list[calibration.Tokens]]:
    """The sequences to verify on, and those to score."""
    apart = recipe.verify_rows
    chosen = calibration.sequences(tokenizer, passages, apart + recipe.rows, recipe.max_length)
    if len(chosen) <= apart:
        raise BadRequest(
            f"scan: {len(chosen)} calibration sequences, and scan.verify_rows keeps {apart} apart; lower it, or give "
            "more text"
        )
    return chosen[:apart], chosen[apart:]


def _batches(
    tokenizer: PreTrainedTokenizerBase, chosen: Sequence[calibration.Tokens], recipe: ScanRecipe, model: Any
) -> Iterable[Batch]:
    return calibration.batches(tokenizer, chosen, recipe.batch_tokens, model.device)


def _reported(scores: dict[str, BlockScores], recipe: ScanRecipe) -> dict[str, BlockScores]:
    """The scores of the widths that were asked for."""
    if recipe.widths is None:
        return scores
    wanted = range(*as_range(recipe.widths))
    return {
        choice: BlockScores(s.metric, s.tokens, s.samples, s.n_tokens, {w: s.values[w] for w in wanted})
        for choice, s in scores.items()
    }


def _check_widths(recipe: ScanRecipe, n_layers: int) -> None:
    if recipe.widths is not None and not set(range(*as_range(recipe.widths))) <= set(range(1, n_layers)):
        raise BadRequest(f"scan.widths is {recipe.widths}; this model has ranges of width 1 to {n_layers - 1}")


def _sound_ranges(config: dict[str, Any], n_layers: int, width: int) -> list[Blocks]:
    """Every range of a width whose removal the architecture allows.

    Raises:
        Refusal: there is none; the reason is that of the first range.
    """
    return _sound(config, n_layers, [tuple(range(s, s + width)) for s in range(n_layers - width + 1)])


def _without(removed: Blocks, n_layers: int) -> list[int]:
    return [i for i in range(n_layers) if i not in removed]


def _sound(config: dict[str, Any], n_layers: int, cuts: Sequence[Blocks]) -> list[Blocks]:
    found: list[Blocks] = []
    refusal: Refusal | None = None
    for cut in cuts:
        try:
            surgery.refuse_unsound(config, _without(cut, n_layers), n_layers)
            found.append(cut)
        except Refusal as error:
            refusal = refusal or error
    if not found and refusal is not None:
        raise refusal
    return found


def _proposals(
    scores: dict[str, BlockScores], screened: Sequence[float] | None, ranges: Sequence[Blocks], k: int
) -> dict[Blocks, str]:
    """Range -> who proposed it: the k best under each token choice and by screening, and the deepest but the last.

    A distance does not see what the blocks behind the range make of the change: on SmolLM2-135M the best range of 8
    blocks was among neither choice's 3 lowest, and the best of those lost 17% more. A loss on few sequences sees it.
    """
    width = len(ranges[0])
    keys = {f"{choice} tokens": [scores[choice].values[width][r[0]] for r in ranges] for choice in TOKEN_CHOICES}
    if screened is not None:
        keys["screening"] = list(screened)
    found: dict[Blocks, list[str]] = {}
    for name, values in keys.items():
        for at in sorted(range(len(ranges)), key=values.__getitem__)[:k]:
            found.setdefault(ranges[at], []).append(name)
    n_layers = len(scores["all"].values[1])
    deepest = [cut for cut in ranges if cut[-1] < n_layers - 1 or len(ranges) == 1]
    found.setdefault((deepest or list(ranges))[-1], []).append("deepest but the last")
    return {cut: ", ".join(names) for cut, names in sorted(found.items())}


def _greedy(verifier: Verifier, config: dict[str, Any], n_layers: int, blocks: int) -> tuple[float, list[Candidate]]:
    """Removes one block at a time, each time the one without which the held-out loss is least.

    Returns:
        The original's loss, and the best cut of every step; the last one is the choice.
    """
    path: list[Candidate] = []
    original_loss, removed = 0.0, Blocks()
    for step in range(1, blocks + 1):
        grown = [tuple(sorted((*removed, i))) for i in range(n_layers) if i not in removed]
        sound = _sound(config, n_layers, grown)
        added = [next(i for i in cut if i not in removed) for cut in sound]
        base_loss, losses = verifier.losses([(i,) for i in added], removed)
        if step == 1:
            original_loss = base_loss
        loss, removed = min(zip(losses, sound, strict=True))
        path.append(Candidate(removed, loss, f"greedy step {step}"))
    return original_loss, path


def _with_scores(
    plan: PrunePlan, scores: dict[str, BlockScores], candidates: Sequence[Candidate], original_loss: float
) -> PrunePlan:
    """The plan with the numbers that its choice rests on; a set of blocks that is no range has no distance."""
    rests_on = {"original_loss": original_loss}
    for candidate in candidates:
        if candidate.removed == plan.removed:
            rests_on["loss"] = candidate.loss
    width, first = len(plan.removed), plan.removed[0]
    if plan.removed == tuple(range(first, first + width)):
        rests_on |= {f"{s.metric}_{choice}": s.values[width][first] for choice, s in scores.items()}
    return PrunePlan(plan.n_layers, plan.kept, plan.why, rests_on)


def _last_only(text: torch.Tensor) -> torch.Tensor:
    """[B, T] bool -> [B, T] bool with only the last true position of each row."""
    import torch

    positions = torch.arange(text.shape[1], device=text.device)
    last = (text * positions).argmax(dim=1)  # [B]
    return (positions == last[:, None]) & text
