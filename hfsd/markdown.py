"""Markdown from text that nobody vouches for: prompts, answers, names. Nothing in it may become markup or a path."""

from __future__ import annotations

import re
from collections.abc import Sequence

# Control characters, bidirectional overrides and lone surrogates: they hide or reorder text, or cannot be written.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
# An interval such as `[54.1, 67.5]` is no link where nothing follows that would make it one, and stays readable.
_INTERVAL = r"(?<![\]!])\[[+-]?\d[\d.]*, [+-]?\d[\d.]*\](?![(\[:])"
_INLINE = re.compile(rf"{_INTERVAL}|[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
_START = re.compile(r"^(?:[#+=-]|\d+(?=[.)](?:\s|$)))")
_NUMBER = re.compile(r"[+-]?\d|-$|n/a$")
# An absolute path of a machine (/a/b, ~/a, C:\\a), not the slashes of a URL, of a Hub id or of `package:x/y`.
_ROOT = r"(?:file://|(?<![\w:/.~-])(?:~?/|[A-Za-z]:\\))"
LOCAL_PATH = re.compile(_ROOT + r"(?:[\w.~+@-]+[/\\])+[\w.~+@-]*|(?<![\w~])~/[\w.+@-]+")
_MASKED = re.compile(_ROOT + r"(?:[\w.~+@ -]*[\w.~+@-][/\\])*(?P<name>[\w.~+@-]+)")


def clean(text: str) -> str:
    """Text without characters that hide or reorder it; line ends become newlines."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def escape(text: str) -> str:
    """One line of Markdown that shows `text` as it is: no markup, link, cell border or HTML comes of it."""
    return _START.sub(lambda m: m[0] + "\\" if m[0].isdigit() else "\\" + m[0], _inline(text))


def _inline(text: str) -> str:
    """`escape` for what does not stand at the start of a line."""
    line = " ".join(clean(str(text)).split())
    line = _INLINE.sub(lambda m: m[0] if len(m[0]) > 1 else "\\" + m[0], line)
    # `&` first; entities are safe for readers of Markdown and of HTML alike
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(sign, entity)
    return line


def fence(text: str, language: str = "text") -> str:
    """A fenced block that `text` cannot leave: its fence is longer than any run of backticks inside."""
    body = clean(str(text)).rstrip("\n")
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", body)), default=0))
    return f"{ticks}{language}\n{body}\n{ticks}"


def without_paths(text: str) -> str:
    """The text with only the last name of each local path, for what leaves the machine."""
    return _MASKED.sub(lambda m: m["name"], text)


def shorten(text: str, limit: int) -> str:
    """At most `limit` characters, with a line that says how many were left out."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()}\n[... {len(text) - limit} more characters]"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Header row and body as a Markdown table; every cell is escaped, columns of numbers stand right."""
    lines = [" | ".join(_inline(c) for c in row) for row in rows]
    lines.insert(1, " | ".join("---:" if of_numbers else ":---" for of_numbers in numeric(rows)))
    return "\n".join(f"| {line} |" for line in lines)


def numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each column of a table, whose first row is its header, holds numbers and nothing else."""
    columns = list(zip(*rows[1:], strict=True)) or [()] * len(rows[0])
    return [all(_NUMBER.match(c) for c in column) for column in columns]
