"""Compare: how far each variant moved from the original on held-out prompts, and everyone's answers side by side."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from hfsd import chat
from hfsd.engines import Request, Sampling, Transformers
from hfsd.errors import BadRequest
from hfsd.family import Family
from hfsd.plain import dumps, from_json
from hfsd.progress import Advance, track
from hfsd.recipe import Compare as CompareRecipe
from hfsd.records import Answer, Example, Shift, Variant
from hfsd.rundir import write_atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BATCH = 8  # prompts per batch of generation


def run(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    variants: Sequence[Variant],
    recipe: CompareRecipe,
    out: Path,
) -> list[Shift]:
    """Answers every prompt with every variant, and measures the shift along the original's own answers.

    Args:
        prompts: held-out rows; the first `recipe.prompts` are used.
        variants: the original first; ids as in the family.
        out: gets answers.jsonl and shift.json; a variant's finished answers under work/ are not made again.
    """
    used = list(prompts[: recipe.prompts])
    if not used:
        raise BadRequest("compare: no held-out prompt; raise data.held_out or give more rows")
    steps = len(used) * (2 * len(variants) - 1)
    answers: dict[str, dict[str, str]] = {}
    with track("compare", steps, "answers") as advance:
        for variant in variants:
            answers[variant.id] = _answers(family, tokenizer, used, variant, recipe, out / "work", advance)
        shifts = _shifts(family, tokenizer, used, answers["original"], variants[1:], advance)
    lines = [Answer(e.id, e.prompt, e.reference, {v: answers[v][e.id] for v in answers}) for e in used]
    write_atomic(out / "answers.jsonl", "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in lines))
    write_atomic(out / "shift.json", dumps(shifts))
    return shifts


def read(folder: Path) -> tuple[list[Shift], list[Answer]]:
    """What a finished compare stage found."""
    shifts = [from_json(Shift, s) for s in json.loads((folder / "shift.json").read_text(encoding="utf-8"))]
    lines = (folder / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    return shifts, [from_json(Answer, json.loads(line)) for line in lines if line]


def _answers(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    variant: Variant,
    recipe: CompareRecipe,
    work: Path,
    advance: Advance,
) -> dict[str, str]:
    """Row id -> the variant's greedy answer."""
    path = work / f"{variant.id}.json"
    if path.is_file():
        advance(len(prompts))
        return json.loads(path.read_text(encoding="utf-8"))
    found: dict[str, str] = {}
    with family.use(variant.id) as model:
        engine = Transformers(model, tokenizer)  # type: ignore[arg-type]
        for at in range(0, len(prompts), BATCH):
            batch = [Request(e.id, chat.asked(e)) for e in prompts[at : at + BATCH]]
            made = engine.generate(batch, Sampling(recipe.max_new_tokens), seed=0)
            found |= {c.id: c.text for c in made}
            advance(len(batch), note=variant.id)
    write_atomic(path, dumps(found))
    return found


def _shifts(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    answers: Mapping[str, str],
    variants: Sequence[Variant],
    advance: Advance,
) -> list[Shift]:
    """KL(original || variant) over the tokens of the original's own answers, one prompt at a time to bound memory.

    Variants on the family's own weights are asked together; each whole checkpoint by itself, since one is held at once.
    """
    groups = [[v for v in variants if v.id not in family.checkpoints]]
    groups += [[v] for v in variants if v.id in family.checkpoints]
    found = [s for g in groups if g for s in _shifts_of(family, tokenizer, prompts, answers, g, advance)]
    return sorted(found, key=lambda s: variants.index(s.variant))


def _shifts_of(
    family: Family,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Example],
    answers: Mapping[str, str],
    variants: Sequence[Variant],
    advance: Advance,
) -> list[Shift]:
    kls: dict[str, list[float]] = {v.id: [] for v in variants}  # mean over a prompt's tokens
    agree: dict[str, int] = dict.fromkeys(kls, 0)
    counts: list[int] = []
    for example in prompts:
        head, tail = chat.answer_ids(tokenizer, chat.asked(example), answers[example.id])
        if not tail:  # the original said nothing here, so there is nothing to compare along
            advance(len(variants))
            continue
        counts.append(len(tail))
        expected = _log_probs(family, "original", head, tail)  # [T, V]
        for variant in variants:
            got = _log_probs(family, variant.id, head, tail)  # [T, V]
            kls[variant.id].append((expected.exp() * (expected - got)).sum(-1).mean().item())
            agree[variant.id] += int((expected.argmax(-1) == got.argmax(-1)).sum())
            advance(note=f"KL {variant.id}")
    if not counts:
        raise BadRequest("compare: the original answered every held-out prompt with nothing; check its chat template")
    return [_shift(v, kls[v.id], counts, agree[v.id]) for v in variants]


def _shift(variant: Variant, kls: list[float], counts: list[int], agree: int) -> Shift:
    total = sum(counts)
    kl = sum(k * n for k, n in zip(kls, counts, strict=True)) / total
    # Tokens of one answer depend on one another, so the spread is taken over prompts.
    stderr = statistics.stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else 0.0
    return Shift(variant, kl, stderr, agree / total, len(counts), total)


def _log_probs(family: Family, variant: str, head: list[int], tail: list[int]) -> torch.Tensor:
    """Log-probabilities of every next token at the answer's positions, [T, V] in float32."""
    import torch

    with torch.inference_mode(), family.use(variant) as model:
        ids = torch.tensor([head + tail], device=model.device)  # [1, P + T]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(head) - 1 : -1]  # [T, V]
        return logits.float().log_softmax(-1)
