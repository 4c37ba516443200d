"""A report as one HTML page that needs nothing beside it: no network, no script. Pure: records in, text out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass

from hfsd import report_figures, report_text, text, vector
from hfsd.assets import assets
from hfsd.figures import COLOURS
from hfsd.findings import VERDICTS, Answer, Results
from hfsd.markdown import clean, numeric
from hfsd.records import spelled
from hfsd.report_text import SHOWN_ANSWERS, SHOWN_CHARS

# The arms' colours upon a dark page: lighter where the ones for white would be hard to see. Same hues.
DARK = {
    "original": "#4AA3E0",
    "pruned": "#F0B13C",
    "sft": "#E097C1",
    "self-distilled": "#2FC59B",
    "sdd+kd": "#C9AA55",
    "on-policy": "#A596DB",
    "merged": "#8CCFF5",
}
# A number and its interval in brackets: the interval is set smaller.
_INTERVAL = re.compile(r"(?P<number>[+-]?\d[^\[]*)(?P<bounds> \[[^\]]*\])")

Span = tuple[str, bool]


@dataclass(frozen=True)
class Text:
    """One text of a side-by-side answer: spans with whether they differ from the original's, and what is not shown."""

    name: str
    paint: str
    spans: list[Span]
    left_out: int
    same: bool = False


@dataclass(frozen=True)
class Side:
    """One prompt and what was answered."""

    id: str
    prompt: Text
    texts: list[Text]


def html(results: Results, answers: Sequence[Answer]) -> str:
    """The text of index.html. The same records give the same bytes.

    Raises:
        HfsdError: the installed package lacks its template.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets("cards")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"clean": clean, "parts": _parts, "numeric": numeric}
    said = text.headline(results)
    verdicts = " ".join(text.verdicts(results))
    return environment.get_template("report.html.j2").render(
        results=results,
        said=said.removesuffix(verdicts).strip(),
        verdicts=verdicts if said.endswith(verdicts) else "",
        tiles=_tiles(results),
        pictures={p.file: _Drawn.of(p) for p in report_figures.pictures(results)},
        paints=[(vector.arm_paint(arm), colour, DARK[arm]) for arm, colour in COLOURS.items()],
        text=text,
        tables=report_text,
        sides=[_side(results, answer) for answer in answers[:SHOWN_ANSWERS]],
        n_answers=len(answers),
        verdict_words=VERDICTS,
    )


@dataclass(frozen=True)
class _Drawn:
    svg: str
    caption: str

    @classmethod
    def of(cls, picture: report_figures.Picture) -> _Drawn:
        import markupsafe

        svg = vector.inline(picture.on_page, picture.file.removesuffix(".png"), picture.words)
        return cls(markupsafe.Markup(svg), picture.caption)


def _tiles(results: Results) -> list[tuple[str, str, str]]:
    """(what, number, what stands under it): the size of the cut, and of the measurement."""
    plan, found = results.plan, text.counted(results)
    pruned = next((v.params for v in results.variants if v.variant.arm != "original"), None)
    gone = spelled(plan.removed) if plan.removed else "none"
    tiles = [("blocks", f"{plan.n_layers} → {len(plan.kept)}", f"{gone} removed")]
    if pruned is not None:
        change = f"{text.count(results.original_params)} → {text.count(pruned)}"
        tiles.append(("parameters", change, f"−{100 * results.param_cut:.2f}%"))
    tiles.append(("matmul FLOPs per token", f"−{100 * results.matmul_flop_cut:.2f}%", "of those of the original"))
    asked = text.at_n(found) if found else "the original clears chance on none"
    tiles.append(("tasks that count", f"{len(found)} of {len({t.task for t in results.tasks})}", asked))
    return tiles


def _side(results: Results, answer: Answer) -> Side:
    texts = [_text("reference", "", answer.reference, None)]
    original = answer.answers.get("original")
    for line in results.variants:
        variant, said = line.variant, answer.answers.get(line.variant.id)
        if said is not None:
            beside = None if variant.arm == "original" else original
            texts.append(_text(variant.id, vector.arm_paint(variant.arm), said, beside))
    return Side(answer.id, _text("prompt", "", answer.prompt, None), texts)


def _text(name: str, paint: str, said: str, original: str | None) -> Text:
    whole = clean(said)
    shown = whole[:SHOWN_CHARS]
    spans = [(shown, False)] if original is None else differences(clean(original)[:SHOWN_CHARS], shown)
    return Text(name, paint, [s for s in spans if s[0]], len(whole) - len(shown), said == original)


def differences(original: str, other: str) -> list[Span]:
    """`other` in pieces, each with whether its words are not the original's at that place. Spaces do not differ."""
    mine, theirs = re.findall(r"\S+", original), list(re.finditer(r"\S+", other))
    matcher = difflib.SequenceMatcher(None, mine, [word[0] for word in theirs], autojunk=False)
    spans, at = [], 0
    for kind, _, _, first, last in matcher.get_opcodes():
        if kind != "equal" and first < last:
            start, stop = theirs[first].start(), theirs[last - 1].end()
            spans += [(other[at:start], False), (other[start:stop], True)]
            at = stop
    return [span for span in [*spans, (other[at:], False)] if span[0]]


def _parts(cell: str) -> list[Span]:
    """A table's cell in pieces, each with whether it is an interval."""
    found = _INTERVAL.fullmatch(cell)
    return [(found["number"], False), (found["bounds"], True)] if found else [(cell, False)]
