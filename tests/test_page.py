"""The report as one page: whole, inert, and readable in a browser. Its bytes are compared in test_report."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hfsd import assets, page, vector
from hfsd.errors import HfsdError
from hfsd.findings import Answer, Estimate
from hfsd.records import PrunePlan
from tests.made import BREAKOUT, DISTILLED, PRUNED, SFT, VARIANTS, answers, made, rows

CHROMIUM = Path("/usr/bin/chromium")
VOID = {"meta", "br", "hr", "img", "link", "input"}
SECTIONS = ["scores", "differences", "removed", "data", "training", "shift", "answers", "draft", "cost", "provenance"]
NASTY = "<b>x</b> \"'> <img src=http://example.com/x.png onerror=alert(1)> {{ 7 * 7 }} & --> </script></svg></style>"
BARE: dict[str, Any] = {"scan": None, "shifts": [], "training": [], "train_sets": {}, "drafts": [], "costs": []}
BARE |= {"stage_seconds": {}}


class Read(HTMLParser):
    """A page as its tags, its texts by the tags they stand in, and what is not closed as it was opened."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.faults: list[str] = []
        self.texts: list[tuple[tuple[str, ...], str]] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.faults.append(f"</{tag}> at {self.getpos()}")

    def handle_data(self, data: str) -> None:
        self.texts.append((tuple(self.open), data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    def within(self, tag: str) -> str:
        return "".join(text for inside, text in self.texts if tag in inside)


@pytest.fixture(scope="module")
def source() -> str:
    return page.html(made(), answers(n=25))


@pytest.fixture(scope="module")
def read(source: str) -> Read:
    return Read(source)


def sound(read: Read) -> None:
    """Every tag is closed, every id is there once, every `#id` is somewhere, and nothing is fetched."""
    assert not read.faults and not read.open
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attrs in read.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form"), tag
        assert not [name for name in attrs if name.startswith("on")], attrs
        for name in ("src", "href", "xlink:href", "srcset", "poster", "action", "background"):
            if (value := attrs.get(name)) is not None:
                assert value.startswith(("#", "data:image/png;base64,")), value
                assert not value.startswith("#") or value[1:] in ids, value
        for value in (v for v in attrs.values() if v):
            assert all(u.startswith("#") for u in re.findall(r"url\(([^)]*)", value)), value
    assert "@import" not in read.within("style") and "url(" not in read.within("style")


def test_structure(read: Read):
    sound(read)
    assert len(read.all("h1")) == 1 and read.all("html")[0]["lang"] == "en"
    assert [a["id"] for a in read.all("section")] == SECTIONS
    linked = [a["href"] for a in read.all("a")]
    assert linked == [f"#{name}" for name in SECTIONS]
    assert len(read.all("svg")) == len(read.all("figure")) == 8
    assert all(a["role"] == "img" and a["aria-label"] and a["viewbox"] for a in read.all("svg"))
    assert all(a.get("scope") in ("col", "row") for a in read.all("th"))
    assert "default-src 'none'" in str(read.all("meta"))


def test_the_answer_comes_first(source: str):
    at = [source.index(part) for part in ("Removing 2 of 6 blocks", "<svg", '<nav aria-label="Contents"', "<table")]
    assert at == sorted(at)


def test_one_order_of_variants_everywhere(source: str):
    ids = [v.id for v in VARIANTS]
    places = {v: [m.start() for m in re.finditer(f">{re.escape(v)}</", source)] for v in ids}
    firsts = [places[v][0] for v in ids]
    assert firsts == sorted(firsts)
    answered = source.split('<div class="side">')[1].split("</details>")[0]
    assert re.findall(r"<h4>([^<]*?)\s*(?:<span>|</h4>)", answered) == ["reference", *ids]


def test_twenty_answers_are_shown(source: str, read: Read):
    assert "20 of 25 held-out prompts" in source and source.count('<div class="side">') == 20
    assert source.count("the same as the original") == 20 * 3


def test_numbers_and_intervals_are_told(source: str):
    for said in ("n = 200", "(nats per token)", "share of the original&#39;s mean score (%)", "mean of ratios", "g=8"):
        assert said in source or said.replace("&#39;", "'") in source, said
    assert '70.0<span class="ci"> [63.3, 75.9]</span>' in source
    assert "hfsd run recipe.yaml --out runs/tiny" in source and "name: tiny\nmodel: org/tiny" in source
    assert "lora_targets" in source and "q_proj, v_proj" in source


def test_hostile_text_is_shown_as_text():
    told = Answer(NASTY, NASTY, BREAKOUT, {"original": "so", **{v.id: NASTY for v in VARIANTS[1:]}})
    results = made(
        name=NASTY,
        recipe=NASTY,
        plan=PrunePlan(6, (0, 1, 4, 5), NASTY),
        rows=rows({NASTY: (0.70, 0.40, 0.55, 0.65)}),
        facts={NASTY: NASTY},
        scan=None,
        shifts=[],
    )
    source = page.html(results, [told])
    read = Read(source)
    sound(read)
    assert not read.all("b") and not read.all("img") and "49" not in read.within("h1")
    assert NASTY in read.within("h1") and read.within("pre").count(NASTY) == 1
    assert "<script>alert('x')</script>" in read.within("section")
    assert NASTY in "".join(text for _, text in read.texts if text.strip())
    assert NASTY in read.within("svg"), "the task's name stands in its picture"


def test_characters_that_hide_or_reorder_text_are_replaced():
    told = Answer("q", "a\u202eb\x00c", "r", {v.id: "x\u2066y" for v in VARIANTS})
    source = page.html(made(scan=None, shifts=[], training=[]), [told])
    assert not re.search("[\u202e\u2066\x00]", source) and "a\ufffdb\ufffdc" in source


def test_long_answers_say_how_much_is_left_out():
    said = "word " * 400
    source = page.html(made(scan=None, shifts=[], training=[]), answers(reply=said, n=1))
    assert source.count(f"[... {len(said) - 1500} more characters]") == 4


def test_what_was_not_measured_is_left_out_or_not_available():
    scores = rows({"tiny_match": (0.30, 0.30, 0.25, 0.25)})  # near chance: nothing counts
    bare = {
        "scan": None,
        "shifts": [],
        "training": [],
        "train_sets": {},
        "drafts": [],
        "costs": [],
        "stage_seconds": {},
    }
    read = Read(page.html(made(rows=scores, **bare, documents={}), []))
    sound(read)
    assert [a["id"] for a in read.all("section")] == ["scores", "removed", "provenance"]
    assert [a["href"] for a in read.all("a")] == ["#scores", "#removed", "#provenance"]
    assert read.within("svg").count("n/a") == 2 * 3 and "no scan was run" in read.within("section")
    assert not re.search(r"\b(None|nan|inf)\b", "".join(text for inside, text in read.texts if "style" not in inside))


def test_a_recovery_without_an_interval_or_far_outside_still_draws():
    results = made()
    wild = [Estimate(95.0), Estimate(-400.0, -900.0, 30.0), Estimate(500.0, 20.0, 3000.0), None]
    lines = [replace(v, recovery=e, chance_corrected=e) for v, e in zip(results.variants, wild, strict=True)]
    svg = vector.inline(lambda: page.report_figures.recovery(replace(results, variants=lines)), "x", "y")
    texts = Read(svg).within("text")
    assert "-400.0% [-900.0, 30.0]" in texts and "500.0% [20.0, 3000.0]" in texts and texts.count("n/a") == 2


def test_pictures_take_the_colours_and_letters_of_the_page(source: str):
    drawn = "".join(re.findall(r"<svg.*?</svg>", source, re.DOTALL))
    assert "font-family" not in drawn and "#000000" not in drawn and "currentColor" in drawn
    for variant in (PRUNED, SFT, DISTILLED):
        name = vector.arm_paint(variant.arm)
        assert f"var({name})" in drawn and len(re.findall(f"{name}: #", source)) == 2, "light and dark"


@pytest.mark.parametrize(
    ("original", "other", "marked"),
    [
        ("It is 5.", "It is 5.", []),
        ("It is 5.", "It\n\nis  5.", []),
        ("It is 5.", "It is 6 or 7.", ["6 or 7."]),
        ("", "new words", ["new words"]),
        ("gone", "", []),
    ],
)
def test_words_that_differ_are_marked(original: str, other: str, marked: list[str]):
    spans = page.differences(original, other)
    assert [text for text, changed in spans if changed] == marked
    assert "".join(text for text, _ in spans) == other


def test_the_template_is_found_in_a_wheel_and_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bare = made(scan=None, shifts=[], training=[])
    monkeypatch.setattr(assets, "PACKAGE", tmp_path / "site" / "hfsd")
    with pytest.raises(HfsdError, match="install hfsd again"):
        page.html(bare, [])
    shutil.copytree(Path(__file__).parents[1] / "cards", tmp_path / "site" / "hfsd" / "_assets" / "cards")
    assert "<h1>tiny</h1>" in page.html(bare, [])


def browser() -> Any:
    """Playwright's browser on Debian's Chromium, or a skip that says what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    return playwright.sync_playwright()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 375])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_in_a_browser(source: str, tmp_path: Path, width: int, scheme: str):
    file = tmp_path / "index.html"
    file.write_text(source, encoding="utf-8")
    faults: list[str] = []
    asked: list[str] = []
    with browser() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu"])
        shown = chromium.new_page(viewport={"width": width, "height": 812}, color_scheme=scheme)
        shown.on("console", lambda message: faults.append(message.text))
        shown.on("pageerror", lambda error: faults.append(str(error)))
        shown.on("request", lambda request: asked.append(request.url))
        shown.route(re.compile("^https?:"), lambda route: route.abort())
        shown.goto(file.as_uri())
        shown.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true })")
        assert shown.evaluate("document.scrollingElement.scrollWidth") <= width, "no sideways scrolling of the page"
        paper, ink = shown.evaluate(
            "[getComputedStyle(document.body).backgroundColor,"
            " getComputedStyle(document.querySelector('svg text')).fill]"
        )
        assert (brightness(paper) > brightness(ink)) == (scheme == "light") and abs(
            brightness(paper) - brightness(ink)
        ) > 150
        small = shown.evaluate(
            "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"
        )
        assert small > 7, "letters in pictures can be read"
        chromium.close()
    assert not faults
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()], "the page asks nobody"


def brightness(colour: str) -> float:
    """Mean of red, green and blue, 0 to 255, of `rgb(r, g, b)`."""
    return sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 3
