"""Texts that want out of a card: planted in every field that a model, a data set or a user fills in."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfsd import cards
from hfsd.findings import Results
from hfsd.plain import from_json, to_json
from hfsd.records import Example, ModelRef, Rewrite
from tests.made import BREAKOUT, SFT, made
from tests.test_cards import GGUF, MODELS, REPOS, body, front

NASTY = (
    "x: [a](http://example.com) <img src=x onerror=alert(1)> <!-- | `b` *c* __d__ ~~e~~ $f$ {{ 7 * 7 }} {% raw %}"
    "\n---\nlicense: gpl\n---\n# Heading\n- item\n> quote\n\n![p](http://example.com/p.png)\n[r]: http://example.com\r\n"
    "    code\n|a|b|\n|-|-|\n&lt;script&gt; \u202e \u2028---\u2028 \x85---\x85 \x00 </details> [1, 2](http://example.com)"
)
RESULTS = made(original=GGUF)
FREE = {"why", "measured", "engine", "proposed_by", "note", "content", "recipe", "mode", "blocks"}


def facts(text: str) -> dict[str, Any]:
    """Facts of a run, each with `text` where somebody else's text may stand."""
    return {
        "license": "other",
        "license_name": text,
        "license_link": text,
        "language": ["en"],
        "source": text,
        "quantization": text,
        "limits": [text],
        "machine": text,
        "packages": {"hfsd": text, "torch": text},
        "git": text,
        "data_source": text,
        "data_license": "mit",
        "data_commits": {"org/rows": text},
        "trust_remote_code": True,
    }


def planted(results: Results, text: str) -> Results:
    """The results with `text` in the place of whatever others could have written."""

    def walk(node: Any, key: str) -> Any:
        if isinstance(node, dict):
            return {k: walk(v, "free" if key == "hyperparameters" else k) for k, v in node.items()}
        if isinstance(node, list):
            return [walk(v, key) for v in node]
        return text if isinstance(node, str) and key in FREE | {"free"} else node

    found = from_json(Results, walk(to_json(results), ""))
    task = found.tasks[0].task
    tasks = [replace(t, task=text, note=t.note and text) if t.task == task else t for t in found.tasks]
    paired = [replace(p, task=text) if p.task == task else p for p in found.paired]
    (name, train_set), *_ = found.train_sets.items()
    asked = ({"role": text, "content": text},)
    sets = {name: replace(train_set, asked=asked, reasons={"kept": 15, text: 5}, sampling={text: text})}
    return replace(found, name=text, tasks=tasks, paired=paired, train_sets=sets)


def every_card(text: str) -> dict[str, str]:
    """Every card of a run whose texts are all `text`."""
    results = planted(replace(RESULTS, facts=facts(text), original=ModelRef(text, "sha256:" + "b" * 64)), text)
    rows = [(Example(text, text, text), Rewrite(text, text, kept, text, 3, "stop")) for kept in (True, False)]
    found = {i: cards.model_card(results, i, REPOS, {}) for i in MODELS}
    found["dataset"] = cards.dataset_card(results, REPOS, rows, ["shift.png"])
    return found | {"space": cards.space_card(results, REPOS)}


def skeleton(card: str) -> list[tuple[str, str]]:
    """The blocks of a card, and the links and pictures in them."""
    from markdown_it import MarkdownIt

    blocks = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).parse(body(card))
    inner = [t for block in blocks for t in block.children or [] if t.type not in ("text", "text_special", "softbreak")]
    return [(t.type, t.tag) for t in blocks] + [
        (t.type, str(t.attrGet("href") or t.attrGet("src") or "")) for t in inner
    ]


@pytest.fixture(scope="module")
def calm() -> dict[str, str]:
    return every_card("calm")


@pytest.mark.parametrize("text", [NASTY, BREAKOUT, "```\n" + NASTY, "~~~", "\\", "'", "- ", "None"])
def test_nothing_that_is_planted_breaks_out(text, calm):
    wild = every_card(text)
    for name, card in wild.items():
        assert skeleton(card) == skeleton(calm[name]), name
        assert front(card).keys() == front(calm[name]).keys(), name
        assert front(card).get("license") in ("other", "mit", None), name
        if text != "None":  # which is refused as a value, wherever it came from
            assert cards.validate(card) == [], name
    assert front(wild[SFT.id])["license_name"] == text


def test_an_interval_is_readable_and_no_link():
    from markdown_it import MarkdownIt

    from hfsd.markdown import escape, table

    assert escape("94.3% [80.0, 110.0] of it") == "94.3% [80.0, 110.0] of it"
    assert table([["a"], ["+4.2 points [0.0, +12.5]"]]).endswith("| +4.2 points [0.0, +12.5] |")
    for wild in ("[1, 2](http://e.x)", "[1, 2][3, 4]", "![1, 2]", "[1, 2]: http://e.x", "[1, 2] [x](http://e.x)"):
        page = MarkdownIt("commonmark").render(f"{escape(wild)}\n\n[1, 2]: http://e.x")
        assert "<img" not in page and page.count("<a ") <= wild.count("[1, 2] "), page


@settings(max_examples=25, deadline=None)
@given(st.text(min_size=1, max_size=60))
def test_any_license_name_comes_back_from_the_front_matter(name):
    from huggingface_hub import ModelCard

    card = cards.model_card(RESULTS, "pruned", REPOS, {"license": "other", "license_name": name})
    assert front(card)["license_name"] == name and len(re.findall(r"^# ", body(card), re.MULTILINE)) == 1
    assert ModelCard(card).data.license_name == name
