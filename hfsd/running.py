"""What running a model costs, and what a variant is worth as a draft model, as tables. All of it is plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from hfsd.findings import Cost, Draft, Estimate, Results
from hfsd.stats import over_prompts
from hfsd.units import NA, count, estimate_text, plural, size

Exact = tuple[str, Callable[[Cost], int | None], Callable[[int], str]]  # a measure: name, number, how it is shown


def draft_table(results: Results, gammas: Sequence[int] | None = None) -> list[list[str]]:
    """Header row, then one row per variant as the original's draft model; empty where none was measured.

    The columns `g=1` and so on are expected tokens per pass of the original with that many drafted ones.

    Args:
        gammas: the numbers of drafted tokens to tell of; None: all.
    """
    if not results.drafts:
        return []
    if gammas is None:
        gammas = sorted({gamma for draft in results.drafts for gamma in draft.tokens_per_pass})
    head = ["variant", "acceptance %", "greedy %", *(f"g={gamma}" for gamma in gammas)]
    return [[*head, "speed-up x [least, greatest prompt]"], *(_draft(draft, gammas) for draft in results.drafts)]


def _draft(draft: Draft, gammas: Sequence[int]) -> list[str]:
    if draft.refused:
        return [draft.variant.id, *[NA] * (len(gammas) + 3)]
    share = over_prompts(draft.acceptance, draft.acceptance_stderr, draft.prompts, top=1.0)
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
    sizes = dict.fromkeys((d.prompts, d.n_tokens) for d in results.drafts if d.prompts)  # the same ones for all
    n = "".join(f", n = {plural(prompts, 'prompt')} ({tokens:,} tokens)" for prompts, tokens in sizes)
    lines = [
        "Acceptance: mean over tokens of the original's own sampled answers of 1 - total variation, exact for sampling "
        f"(Leviathan et al. 2023), with a 95% interval over prompts (Student's t){n}. Greedy: share of tokens of the "
        "original's greedy answers that the variant puts first. g=1 and so on: expected tokens per pass of the "
        "original with that many drafted ones, (1 - a^(g + 1)) / (1 - a), which takes acceptances as independent."
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
    kind = f" ({costs[0].dtype})" if costs[0].dtype else ""  # all are loaded in one type
    grows_not: list[Exact] = [(f"fixed part of the cache{kind}", lambda c: c.state_bytes, size)]
    exact: list[Exact] = [
        ("parameters", lambda c: c.params, count),
        ("matmul FLOPs per token", lambda c: c.matmul_flops, _flops),
        (f"KV cache per token{kind}", lambda c: c.kv_bytes, size),
        *(grows_not if any(c.state_bytes for c in costs) else []),
        ("checkpoint", lambda c: c.checkpoint_bytes, size),
        (f"peak memory of a process with this model alone{kind}", lambda c: c.peak_bytes, size),
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
    """What stands under the cost table: what is not known and why, and how it was measured."""
    if not results.costs:
        return []
    lines = ["The arms have the pruned shape once they are merged."]
    if any(c.state_bytes for c in results.costs):
        lines.append("The fixed part of the cache does not grow with the text: states, and windows once they are full.")
    lines += dict.fromkeys(f"Cache: {_end(c.note)}" for c in results.costs if c.note)
    return lines + [f"Measured: {how}" for how in dict.fromkeys(_end(c.measured) for c in results.costs if c.measured)]


def _flops(n: int) -> str:
    return f"{n / 1e9:.3f} G" if n >= 1e9 else f"{n / 1e6:.1f} M"


def _end(sentence: str) -> str:
    return sentence.rstrip(".") + "."
