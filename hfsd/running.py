"""What running a model costs, and what a variant is worth as a draft model, as tables. All of it is plain text."""

from __future__ import annotations

from collections.abc import Callable

from hfsd.findings import Cost, Draft, Estimate, Results
from hfsd.stats import Z95
from hfsd.units import NA, count, estimate_text, size


def draft_table(results: Results) -> list[list[str]]:
    """Header row, then one row per variant as the original's draft model; empty where none was measured.

    The columns `g=1` to `g=8` are expected tokens per pass of the original with that many drafted ones.
    """
    if not results.drafts:
        return []
    gammas = sorted({gamma for draft in results.drafts for gamma in draft.tokens_per_pass})
    head = ["variant", "acceptance %", "greedy %", *(f"g={gamma}" for gamma in gammas), "speed-up x"]
    return [head, *(_draft(draft, gammas) for draft in results.drafts)]


def _draft(draft: Draft, gammas: list[int]) -> list[str]:
    if draft.refused:
        return [draft.variant.id, *[NA] * (len(gammas) + 3)]
    half = Z95 * draft.acceptance_stderr
    share = Estimate(draft.acceptance, max(0.0, draft.acceptance - half), min(1.0, draft.acceptance + half))
    passes = (draft.tokens_per_pass.get(gamma) for gamma in gammas)
    return [
        draft.variant.id,
        estimate_text(share, 100),
        f"{100 * draft.greedy:.1f}",
        *(NA if tokens is None else f"{tokens:.2f}" for tokens in passes),
        estimate_text(draft.speedup, places=2),
    ]


def draft_notes(results: Results) -> list[str]:
    """What stands under the draft table: the numbers, how the speed-up was measured, who is no draft and why."""
    if not results.drafts:
        return []
    lines = [
        "Acceptance: mean over tokens of the original's own sampled answers of 1 - total variation, exact for sampling "
        "(Leviathan et al. 2023), with a 95% interval over prompts. Greedy: share of tokens of the original's greedy "
        "answers that the variant puts first. g=1 and so on: expected tokens per pass of the original with that many "
        "drafted ones, (1 - a^(g + 1)) / (1 - a), which takes acceptances as independent."
    ]
    measured = dict.fromkeys(d.measured for d in results.drafts if d.measured and not d.refused)
    if len(measured) == 1:
        lines.append(f"Speed-up: {_end(next(iter(measured)))}")
    else:
        lines += [
            f"Speed-up of {d.variant.id}: {_end(d.measured)}" for d in results.drafts if d.measured and not d.refused
        ]
    return lines + [
        f"{d.variant.id} is no draft for the original: {_end(d.refused)}" for d in results.drafts if d.refused
    ]


def cost_table(results: Results) -> list[list[str]]:
    """Header row, then one row per measure, a column per shape and, of two, their ratio; empty where none is known."""
    costs = results.costs
    if not costs:
        return []
    speed = dict[str, Callable[[Cost], Estimate | None]](prefill=lambda c: c.prefill, decode=lambda c: c.decode)
    exact: list[tuple[str, Callable[[Cost], int | None], Callable[[int], str]]] = [
        ("parameters", lambda c: c.params, count),
        ("matmul FLOPs per token", lambda c: c.matmul_flops, _flops),
        ("KV cache per token", lambda c: c.kv_bytes, size),
        ("checkpoint", lambda c: c.checkpoint_bytes, size),
        ("peak memory of a process with this model alone", lambda c: c.peak_bytes, size),
    ]
    rows = []
    for name, number, shown in exact:
        numbers = [number(c) for c in costs]
        rows.append([name, *(NA if n is None else shown(n) for n in numbers), *_ratio(numbers)])
    for name, measure in speed.items():
        found = [measure(c) for c in costs]
        cells = [estimate_text(e) if e else NA for e in found]
        rows.append(
            [f"{name}, tokens/s [least, greatest turn]", *cells, *_ratio([e.value if e else None for e in found])]
        )
    ratio = [f"{costs[1].shape} / {costs[0].shape}"] if len(costs) == 2 else []
    return [["what", *(c.shape for c in costs), *ratio], *rows]


def _ratio(numbers: list[int | None] | list[float | None]) -> list[str]:
    """The second over the first, in a table of two."""
    if len(numbers) != 2:
        return []
    first, second = numbers
    return [f"{second / first:.3f} x" if first and second is not None else NA]


def cost_notes(results: Results) -> list[str]:
    """What stands under the cost table: how it was measured."""
    measured = dict.fromkeys(_end(c.measured) for c in results.costs if c.measured)
    alone = "The arms have the pruned shape once they are merged."
    return [alone, *(f"Measured: {how}" for how in measured)] if results.costs else []


def _flops(n: int) -> str:
    return f"{n / 1e9:.3f} G" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _end(sentence: str) -> str:
    return sentence.rstrip(".") + "."
