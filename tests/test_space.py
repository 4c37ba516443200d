"""The Space, started as it is published: a folder with `hfsd` beside app.py, and nothing of ours installed."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hfsd.errors import BadRequest
from tests import tiny

TOP = Path(__file__).resolve().parent.parent
CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
N_LAYERS, KEPT = 4, (0, 2, 3)
SFT, SELF, BROKEN = "sft-tiny", "self-distilled-tiny", "self-distilled-zz"
VARIANTS = ["original", "pruned", SFT, SELF]  # and the broken one, which must not trouble them
PROMPT = "Ada has 3 pens and buys 4 more. How many pens?"
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Served:
    """A running Space: where it answers, and the folder it was staged in."""

    url: str
    folder: Path
    process: subprocess.Popen[str]


def adapter(folder: Path, base: Path, seed: int) -> Path:
    """A random LoRA adapter on the pruned model, saved as training saves it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from hfsd import models, surgery

    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(surgery.view(models.load(base), KEPT), config).save_pretrained(folder)
    return folder


def stage(root: Path) -> Path:
    """A Space folder beside its models, as publish stages it, with one adapter that is not there."""
    original = tiny.llama(root / "original", n_layers=N_LAYERS, seed=8)  # a seed with which all say something
    for seed, name in enumerate((SFT, SELF), 1):
        adapter(root / name / "adapter", original, seed)
    space = root / "space"
    shutil.copytree(TOP / "space", space, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(TOP / "hfsd", space / "hfsd", ignore=shutil.ignore_patterns("__pycache__"))
    family = {
        "name": "tiny",
        "title": "Tiny: original, SFT and self-distilled",
        "n_layers": N_LAYERS,
        "kept": list(KEPT),
        "original": {"path": "../original"},
        "adapters": {name: {"path": f"../{name}/adapter"} for name in (BROKEN, SELF, SFT)},
        "params": dict.fromkeys(VARIANTS, 38944),
        "sentence": "removes blocks [1, 2) of 4, counted from 0; keeps 3",
        "headline": "Self-distilled recovers 93.4% of the original, SFT 88.0%.",
        "examples": [
            {
                "prompt": "Ben has 2 cups and <b>3</b> more. How many?",
                "reference": "2 + 3 = 5\n#### 5",
                "answers": {v: f"{v} says `1 < 2`, <i>so</i>\n#### 5" for v in VARIANTS},
            }
        ],
        "repos": {"original": "acme/tiny", "pruned": "tiny-pruned", "dataset": "acme/tiny-rewritten"},
        "max_new_tokens": 24,
    }
    (space / "family.json").write_text(json.dumps(family), encoding="utf-8")
    return space


def start(space: Path) -> Served:
    """Runs app.py from its own folder; returns once the page answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "SPACE_ID")} | QUIET
    with open(space.parent / "space.log", "w", encoding="utf-8") as log:
        command = [sys.executable, "app.py", "--port", str(port)]
        process = subprocess.Popen(command, cwd=space, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}/"
    for _ in range(600):
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return Served(url, space, process)
        except OSError:
            time.sleep(0.1)
    stop(process)
    raise AssertionError(f"the Space did not answer: {(space.parent / 'space.log').read_text(encoding='utf-8')}")


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    space = start(stage(tmp_path_factory.mktemp("published")))
    yield space
    stop(space.process)


@pytest.fixture(scope="module")
def client(served: Served) -> Any:
    from gradio_client import Client

    return Client(served.url, verbose=False)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The Space's modules that need no Gradio, imported as app.py does and forgotten afterwards."""
    monkeypatch.syspath_prepend(str(TOP / "space"))
    found = {name: importlib.import_module(name) for name in ("decode", "runtime", "looks")}
    yield SimpleNamespace(**found)
    for name in found:
        del sys.modules[name]


def expected(folder: Path, variant: str, new_tokens: int) -> tuple[str, int]:
    """What plain `generate` says, on the same weights."""
    import torch

    from hfsd import chat, models
    from hfsd.family import Family

    root = folder.parent
    tokenizer = models.load_tokenizer(root / "original")
    family = Family(models.load(root / "original"), KEPT, {v: root / v / "adapter" for v in (SFT, SELF)})
    head = tokenizer(chat.render(tokenizer, chat.single_turn(PROMPT)), add_special_tokens=False, return_tensors="pt")
    with family.use(variant) as model, torch.inference_mode():
        out = model.generate(**head, max_new_tokens=new_tokens, do_sample=False)[0, head["input_ids"].shape[1] :]
    return tokenizer.decode(out, skip_special_tokens=True).strip(), len(out)


def test_compare_equals_generate_and_a_broken_arm_fails_alone(served: Served, client: Any) -> None:
    answers = client.predict(PROMPT, 16, 0.0, 0, api_name="/compare")
    broken = answers.pop(BROKEN)
    assert broken["text"] == "" and "no adapter_config.json" in broken["error"]
    assert str(served.folder.parent) not in broken["error"], "visitors need not know the server's folders"
    assert list(answers) == VARIANTS
    for variant, answer in answers.items():
        assert set(answer) == {"text", "tokens", "tokens_per_second"}
        assert (answer["text"], answer["tokens"]) == expected(served.folder, variant, 16)
        assert answer["tokens_per_second"] > 0
    assert len({answer["text"] for answer in answers.values()}) == len(VARIANTS), "every variant has its own weights"


def test_sampling_repeats_with_its_seed(client: Any) -> None:
    def texts(seed: int) -> list[str]:
        answers = client.predict(PROMPT, 16, 1.0, seed, api_name="/compare")
        return [answer["text"] for answer in answers.values()]

    first = texts(1)
    assert first == texts(1)
    assert first != texts(2)


@pytest.mark.parametrize(
    ("prompt", "new_tokens", "temperature", "named"),
    [
        ("x" * 4001, 16, 0.0, "4001 characters; the limit is 4000"),
        ("x" * 2000, 16, 0.0, "the limit is 1008, which is the model's context of 1024"),
        ("  ", 16, 0.0, "the prompt is empty"),
        (PROMPT, 25, 0.0, "max_new_tokens is 25; it must be 1 to 24"),
        (PROMPT, 16, 9.0, "temperature is 9; it must be 0 (greedy) to 2"),
    ],
)
def test_refusals_name_the_limit(client: Any, prompt: str, new_tokens: int, temperature: float, named: str) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match=re.escape(named).replace("'", ".*")):
        client.predict(prompt, new_tokens, temperature, 0, api_name="/compare")


def test_without_a_family_it_says_so(modules: Any, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match=r"no .*family\.json; this folder is run as"):
        modules.runtime.read_spec(tmp_path / "family.json")
    (tmp_path / "family.json").write_text('{"name": "x", "colour": 1}', encoding="utf-8")
    with pytest.raises(BadRequest, match="colour"):
        modules.runtime.read_spec(tmp_path / "family.json")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a <b>bold</b> claim & more", "a &lt;b>bold&lt;/b> claim &amp; more"),
        ("`x < y` and\n```\n<i> & ![a](b)\n```", "`x < y` and\n```\n<i> & ![a](b)\n```"),
        ("![track](http://example.com/x.png)", "!\\[track](http://example.com/x.png)"),
        ("so\n#### 42\n# Heading", "so\n\\#### 42\n# Heading"),
    ],
)
def test_text_of_a_model_is_inert(modules: Any, text: str, shown: str) -> None:
    assert modules.looks.safe(text) == shown


def test_requirements_are_exact_and_third_party() -> None:
    lines = (TOP / "space" / "requirements.txt").read_text(encoding="utf-8").split()
    assert all(re.fullmatch(r"[a-z0-9-]+==\d+(\.\d+)+", line) for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(names) and "hfsd" not in names


def browser() -> Any:
    """Playwright's browser on Debian's Chromium, or a skip that says what is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is not installed")
    if not CHROMIUM.exists():
        pytest.skip(f"no {CHROMIUM}")
    return playwright.sync_playwright()


def columns_of(page: Any) -> dict[str, str]:
    """What the visible columns show, by variant."""
    texts = {v: page.locator(f"#column-{v}").get_by_test_id("markdown") for v in VARIANTS}
    return {v: text.inner_text().strip() for v, text in texts.items() if text.is_visible()}


@pytest.mark.browser
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_page_in_a_browser(served: Served, tmp_path: Path, theme: str) -> None:
    with browser() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        page = chromium.new_page(viewport={"width": 1280, "height": 900})
        faults: list[str] = []
        asked: set[str] = set()
        page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.add(request.url))
        page.goto(f"{served.url}?__theme={theme}")
        page.get_by_text("Models are loaded.").wait_for(timeout=30_000)
        page.get_by_label("Prompt").fill("x" * 4001)
        page.get_by_role("button", name="Ask").click()
        page.get_by_text("the limit is 4000").wait_for(timeout=30_000)
        page.locator("#column-original .stats").get_by_text("not asked").wait_for(timeout=30_000)
        page.get_by_label("Prompt").fill(PROMPT)
        page.get_by_label("Show the pruned model").check()
        page.get_by_role("button", name="Ask").click()
        for variant in VARIANTS:
            page.locator(f"#column-{variant} .stats").get_by_text("tokens/s").wait_for(timeout=30_000)
        page.wait_for_function("![...document.querySelectorAll('.stats')].some(e => e.innerText.includes('…'))")
        assert all(columns_of(page)[v] for v in VARIANTS)
        page.screenshot(path=tmp_path / f"asked-1280-{theme}.png", full_page=True)

        page.get_by_label("Show the pruned model").uncheck()
        page.locator("#examples button").first.click()
        page.locator(f"#column-{SFT}").get_by_text("<i>so</i>").wait_for(timeout=30_000)
        page.screenshot(path=tmp_path / f"example-1280-{theme}.png", full_page=True)
        page.set_viewport_size({"width": 360, "height": 780})
        page.screenshot(path=tmp_path / f"example-360-{theme}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360, "no sideways scrolling on a phone"
        page.get_by_role("tab", name="About").click()
        page.get_by_text("What was removed").wait_for()
        page.screenshot(path=tmp_path / f"about-360-{theme}.png", full_page=True)
        chromium.close()
    assert not faults
    outside = {url for url in asked if not url.startswith((served.url, "data:", "blob:"))}
    assert not outside, "the page asks nobody else"


def test_the_card_asks_for_the_gradio_that_is_pinned():
    from hfsd import metadata

    pinned = (Path(__file__).parents[1] / "space" / "requirements.txt").read_text()
    assert f"gradio=={metadata.GRADIO}" in pinned.splitlines()
