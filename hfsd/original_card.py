"""What the card of the original hands on to the cards of what is made from it. Pure: text in, facts out."""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from typing import Any

import yaml

from hfsd.metadata import HUB, LICENSES
from hfsd.records import ModelRef

SECTIONS = 4
SECTION_CHARS = 1000  # of one section; the whole of it is on the original's own card
_FRONT = re.compile(r"\A\ufeff?---\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_HEADING = re.compile(r" {0,3}(#{1,6})\s+(.*?)\s*#*\s*")
_TOPIC = re.compile(r"limit|bias|risk|safety|ethic|misuse|out[- ]of[- ]scope|caveat|harm", re.IGNORECASE)
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[A-Za-z]{2,4})?|code|multilingual")
_FENCE = re.compile(r" {0,3}(?:```|~~~)")
_ITEM = re.compile(r"\s*(?:[-*+]|\d{1,3}[.)])\s+")
_MARKUP = (
    (re.compile(r"<!--.*?-->|</?[A-Za-z][^<>]*>|!\[[^\]]*\]\([^)]*\)"), ""),
    (re.compile(r"\[([^\[\]]*)\]\([^()]*\)"), r"\1"),
    (re.compile(r"[*`]+|(?<!\w)_+|_+(?!\w)|^>\s*|\\(?=[^\w\s])"), ""),
)


def facts(readme: str, home: ModelRef | None = None, license_: str | None = None) -> dict[str, Any]:
    """License, languages, and what the card says of limits, bias and safety; what it does not say is left out.

    Args:
        readme: README.md of the original.
        home: the original on the Hub, which a link to a file of its repo then points to; None: it is not there.
        license_: what is stated elsewhere and goes before what the card says.
    """
    block = _FRONT.match(readme)
    try:
        data = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError:  # somebody else's card: what cannot be read is not known
        data = None
    known = data if isinstance(data, dict) else {}
    found = {
        **({} if license_ else _license(known, home)),
        "language": _languages(known.get("language")),
        "limits": list(_limits(readme[block.end() :] if block else readme)),
    }
    return {name: value for name, value in found.items() if value}


def _license(known: dict[Any, Any], home: ModelRef | None) -> dict[str, Any]:
    """The license in the Hub's terms: one that has no identifier of its own is `other`, under its name."""
    named = known.get("license")
    if isinstance(named, list) and len(named) == 1:
        named = named[0]
    if not isinstance(named, str) or not named.strip():
        return {}
    name = " ".join(named.lower().split())
    other, link = known.get("license_name"), _link(known.get("license_link"), home)
    if name in LICENSES and name != "other":
        return {"license": name, "license_link": link}
    if not isinstance(other, str) or not other.strip():
        other = "see the original" if name == "other" else named
    return {"license": "other", "license_name": " ".join(other.split()), "license_link": link}


def _link(link: Any, home: ModelRef | None) -> str | None:
    """An address that holds outside of the original's repo too."""
    if not isinstance(link, str) or not link.strip():
        return None
    link = link.strip()
    if re.fullmatch(r"https?://[^\s<>\"']+", link):
        return link
    inside = re.fullmatch(r"(?:\./)?((?:[\w-][\w.-]*/)*[\w-][\w.-]*)", link)
    return f"{HUB}/{home.repo}/blob/{home.revision or 'main'}/{inside[1]}" if inside and home else None


def _languages(given: Any) -> list[str]:
    listed = given if isinstance(given, list) else [given]
    codes = ["no" if code is False else code for code in listed]  # YAML reads Norwegian as false
    return list(dict.fromkeys(c for c in codes if isinstance(c, str) and _LANGUAGE.fullmatch(c)))


def _limits(body: str) -> Iterator[str]:
    """Paragraphs of every section whose heading speaks of limits or safety, as plain text."""
    level, lines, found = 0, list[str](), 0
    for depth, line in [*_lines(body), (1, "")]:
        if depth and depth <= level:
            yield from _shortened(_paragraphs(lines))
            level, lines, found = 0, [], found + 1
        if not level and depth and found < SECTIONS and _TOPIC.search(line):
            level = depth
        elif level:
            lines += ["", ""] if depth else [line]


def _lines(body: str) -> Iterator[tuple[int, str]]:
    """(level, text) of every line outside of code: 0 where it is no heading."""
    fenced = False
    for line in body.splitlines():
        if _FENCE.match(line):
            fenced = not fenced
            yield 0, ""
        elif not fenced:
            heading = _HEADING.fullmatch(line)
            yield (len(heading[1]), heading[2]) if heading else (0, line)


def _paragraphs(lines: list[str]) -> Iterator[str]:
    """Paragraphs and list items, one line each, without their markup; tables are left out."""
    parts = [list[str]()]
    for line in lines:
        if not line.strip() or line.lstrip().startswith("|"):
            parts.append([])
        elif _ITEM.match(line):
            parts.append([_ITEM.sub("", line, count=1)])
        else:
            parts[-1].append(line)
    for part in parts:
        text = " ".join(part)
        for markup, shown in _MARKUP:
            text = markup.sub(shown, text)
        if text := " ".join(html.unescape(text).split()):
            yield text


def _shortened(paragraphs: Iterator[str]) -> Iterator[str]:
    left = SECTION_CHARS
    for text in paragraphs:
        if len(text) > left:
            cut = text[:left].rpartition(". ")[0] or text[:left].rpartition(" ")[0]
            yield f"{cut} [...]".strip()
            return
        yield text
        left -= len(text)
