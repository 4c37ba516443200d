"""Numbers as text: parameters, bytes, times, shares, estimates with their 95% intervals; and columns of text."""

from __future__ import annotations

from collections.abc import Sequence

from hfsd.findings import Estimate

NA = "n/a"


def count(n: int) -> str:
    """A number of parameters: `134.5 M`, `8.030 B`."""
    if n >= 1_000_000_000:
        return f"{n / 1e9:.3f} B"
    return f"{n / 1e6:.1f} M" if n >= 1_000_000 else f"{n:,}"


def size(n: float) -> str:
    """Bytes in powers of 1000: `1.24 GB`."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.2f} GB"


def duration(seconds: float) -> str:
    """Wall time: `0.4 s`, `42 s`, `3 min 05 s`, `2 h 10 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, left = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{left} s"
    return f"{minutes} min {left:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plural(n: int, word: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def percent(share: float | None) -> str:
    """A share as `43.5%`."""
    return NA if share is None else f"{100 * share:.1f}%"


def estimate_text(found: Estimate | None, scale: float = 1.0, places: int = 1, sign: str = "", unit: str = "") -> str:
    """`94.3 [88.1, 101.2]`, or with a unit `94.3% [88.1, 101.2]`.

    Args:
        found: None prints as n/a; without bounds, the text says that there is no interval.
        scale: what value and bounds are multiplied with.
        places: decimals.
        sign: `+` prints the sign of positive numbers too, nought apart.
        unit: stands behind the value.
    """
    if found is None:
        return NA

    def number(value: float) -> str:
        shown = round(scale * value, places)
        return f"{shown:{sign}.{places}f}" if shown else f"{0:.{places}f}"  # nought has no sign

    bounds = "no interval" if found.low is None or found.high is None else f"{number(found.low)}, {number(found.high)}"
    return f"{number(found.value)}{unit} [{bounds}]"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line per row: columns as wide as their widest cell, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def p_text(p: float) -> str:
    """A p value: `p = 0.034`, `p < 0.001`."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
