"""A picture as inline SVG for a page of ours: its letters are the page's, its colours follow light and dark."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from hfsd.figures import CHOICE, COLOURS, MUTED, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def arm_paint(arm: str) -> str:
    """Name of the page's CSS variable that holds the colour of an arm."""
    return "--arm-" + re.sub(r"\W", "-", arm)


# What matplotlib draws -> what the page paints; white stays white, since it lies on the heat map.
PAINTS = {
    **{colour.lower(): f"var({arm_paint(arm)})" for arm, colour in COLOURS.items()},
    CHOICE.lower(): "var(--choice)",
    MUTED.lower(): "var(--muted)",
    "#e4e4e4": "var(--grid)",
    "#333333": "currentColor",
    "#000000": "currentColor",
}


def inline(make: Callable[[], Figure], name: str, words: str) -> str:
    """`<svg>...</svg>` of a figure, the same bytes for the same figure.

    Letters stay text: the page's font draws them, and a reader can search them.

    Args:
        name: keeps the ids of one picture apart from those of the others on the page.
        words: what stands in for the picture where it is read out.
    """
    import matplotlib

    drawn = io.StringIO()
    with style():
        matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": name})
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        make().savefig(drawn, format="svg", transparent=True, dpi=160, metadata=nothing)
    return _for_page(drawn.getvalue(), words)


def _for_page(source: str, words: str) -> str:
    """The drawing without what belongs to a file of its own, or would touch the rest of the page."""
    box = re.search(r'<svg [^>]*viewBox="([\d. -]+)"[^>]*>', source)
    assert box is not None, "matplotlib writes a viewBox"
    svg = source[box.end() :]
    # comments repeat texts; the sheet is for every element of a page, and ours holds it; ids repeat in every picture
    for pattern in (r"<!--.*?-->", r"<metadata>.*?</metadata>", r"<style[^>]*>.*?</style>", r"<defs>\s*</defs>"):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<g|<text|<image)( [^>]*?)? id="[^"]*"', r"\1\2", svg)
    svg = re.sub(r'style="[^"]*"', lambda found: _painted(found[0]), svg).replace("xlink:href=", "href=")
    svg = re.sub(r"\n\s*", "\n", svg)
    return f'<svg role="img" aria-label="{html.escape(words)}" viewBox="{box[1]}">{svg.strip()}'


def _painted(styles: str) -> str:
    """Styles of one element with the page's colours and the page's font."""
    styles = re.sub(r"font-family: [^;\"]*;? ?", "", styles)
    return re.sub(r"#[0-9a-f]{6}", lambda colour: PAINTS.get(colour[0], colour[0]), styles)
