"""Original, SFT and self-distilled, answering side by side: reads family.json beside it, `python app.py` serves it."""

from __future__ import annotations

import argparse
import html
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Before Gradio and the Hub's client are imported: they read these once.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

try:
    import spaces  # ZeroGPU patches torch, so that it has to come before it
except ImportError:
    spaces = None

import gradio as gr
import looks
from decode import Settings
from runtime import MAX_PROMPT_CHARS, MAX_TEMPERATURE, Answer, Runtime, Spec, read_spec

from hfsd.errors import HfsdError

HERE = Path(__file__).resolve().parent
WAITING_VISITORS = 20  # a longer queue would be answered after everybody has left
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
GPU_SECONDS = 120


@dataclass(frozen=True)
class ColumnView:
    """The components of one variant's column."""

    variant: str
    box: gr.Column
    text: gr.Markdown
    foot: gr.HTML


class Page:
    """The page and its API over one runtime."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime, self.spec = runtime, runtime.spec
        self.stream = spaces.GPU(duration=GPU_SECONDS)(runtime.stream) if spaces else runtime.stream

    def build(self) -> gr.Blocks:
        """The whole page; needs no model."""
        with gr.Blocks(title=self.spec.title, analytics_enabled=False) as page:
            gr.Markdown(f"# {looks.safe(self.spec.title)}\n{looks.safe(self.spec.headline)}")
            self._status(page)
            with gr.Tab("Compare"):
                self._compare_tab()
            with gr.Tab("About"):
                gr.Markdown(looks.about(self.spec))
            gr.api(self.compare, api_name="compare", **ONE_AT_A_TIME)
        return page.queue(max_size=WAITING_VISITORS, default_concurrency_limit=1)

    def compare(
        self, prompt: str, max_new_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> dict[str, dict[str, Any]]:
        """Every variant's answer to one prompt.

        Args:
            prompt: the user's turn, without a chat template.
            max_new_tokens: per variant, the end-of-turn token included.
            temperature: 0 is greedy.
            seed: of sampling, the same for every variant.

        Returns:
            Variant id -> text, tokens, tokens_per_second, and error where that variant failed.
        """
        answers: dict[str, Answer] = {}
        settings = Settings(int(max_new_tokens), float(temperature), int(seed))
        for answers in self._spoken(prompt, settings, self.spec.ids):  # noqa: B007 (the last one counts)
            pass
        return {variant: _plain(answer) for variant, answer in answers.items()}

    def _status(self, page: gr.Blocks) -> None:
        """The line that shows loading, asked for once a second until the models are there."""
        line = gr.HTML(looks.loading(self.runtime.progress), elem_id="loading", padding=False)
        timer = gr.Timer(1.0)

        def look() -> tuple[str, gr.Timer]:
            return looks.loading(self.runtime.progress), gr.Timer(active=not self.runtime.settled.is_set())

        unseen: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        gr.on([page.load, timer.tick], look, outputs=[line, timer], **unseen)

    def _compare_tab(self) -> None:
        prompt = gr.Textbox(
            label="Prompt",
            info=f"Up to {MAX_PROMPT_CHARS} characters. Shift+Enter asks.",
            placeholder="Ask all of them the same question",
            lines=3,
            max_lines=10,
            elem_id="prompt",
        )
        with gr.Row(elem_id="buttons"):
            ask = gr.Button("Ask", variant="primary", elem_id="ask", min_width=80)
            stop = gr.Button("Stop", elem_id="stop", min_width=80)
            clear = gr.Button("Clear", elem_id="clear", min_width=80)
        with gr.Accordion("Settings", open=False), gr.Row():
            most = self.spec.max_new_tokens
            tokens = gr.Slider(
                1, most, value=min(256, most), step=1, label="Max tokens", info="for each answer", min_width=200
            )
            heat = gr.Slider(
                0, MAX_TEMPERATURE, value=0, step=0.05, label="Temperature", info="0 is greedy", min_width=200
            )
            seed = gr.Number(0, label="Seed", info="the same for every column", precision=0, min_width=200)
        examples = self._examples()
        show = gr.Checkbox(False, label="Show the pruned model, nothing trained", elem_id="show-pruned")
        with gr.Row(elem_classes="columns"):
            views = [self._column(v) for v in self.spec.ids]
        reference = gr.Markdown(visible=False, line_breaks=True, container=True)
        self._wire(views, prompt, (ask, stop, clear), [prompt, tokens, heat, seed, show], examples, reference)

    def _examples(self) -> gr.Dataset | None:
        if not self.spec.examples:
            return None
        return gr.Dataset(
            components=[gr.Textbox(visible=False)],
            samples=[[e.prompt] for e in self.spec.examples],
            sample_labels=[_short(e.prompt) for e in self.spec.examples],
            label="Held-out prompts of the run, with the answers it recorded",
            type="index",
            layout="gallery",
            elem_id="examples",
        )

    def _column(self, variant: str) -> ColumnView:
        arm = looks.arm_of(variant)
        classes = ["answer", f"arm-{arm}"]
        with gr.Column(
            min_width=270, elem_classes=classes, elem_id=f"column-{variant}", visible=arm != "pruned"
        ) as box:
            gr.HTML(looks.head(variant, self.spec), padding=False)
            text = gr.Markdown(elem_classes="words", line_breaks=True, sanitize_html=True)
            foot = gr.HTML(looks.foot("not asked yet"), padding=False)
        return ColumnView(variant, box, text, foot)

    def _wire(
        self,
        views: list[ColumnView],
        prompt: gr.Textbox,
        buttons: tuple[gr.Button, gr.Button, gr.Button],
        inputs: list[Any],
        examples: gr.Dataset | None,
        reference: gr.Markdown,
    ) -> None:
        ask, stop, clear = buttons
        cells = [cell for view in views for cell in (view.text, view.foot)]
        unseen: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
        asked = gr.on([ask.click, prompt.submit], self._ask, inputs, [*cells, reference], **unseen, **ONE_AT_A_TIME)
        stop.click(None, cancels=[asked], api_visibility="private")
        blank = [cell for _ in views for cell in ("", looks.foot("not asked yet"))]
        clear.click(
            lambda: ["", *blank, gr.Markdown(visible=False)],
            outputs=[prompt, *cells, reference],
            cancels=[asked],
            queue=False,
            **unseen,
        )
        pruned = next(view.box for view in views if view.variant == "pruned")
        inputs[-1].change(lambda on: gr.Column(visible=on), inputs[-1], pruned, queue=False, **unseen)
        if examples is not None:
            examples.click(
                self._recorded, examples, [prompt, *cells, reference], cancels=[asked], queue=False, **unseen
            )

    def _ask(self, prompt: str, tokens: int, heat: float, seed: int, pruned: bool) -> Iterator[list[Any]]:
        variants = [v for v in self.spec.ids if pruned or v != "pruned"]
        settings = Settings(int(tokens), float(heat), int(seed or 0))
        hidden = gr.Markdown(visible=False)
        yield [*self._cells(dict.fromkeys(variants, Answer())), hidden]
        try:
            for answers in self._spoken(prompt, settings, variants):
                yield [*self._cells(answers), hidden]
        except gr.Error:
            yield [*self._cells({}), hidden]  # nobody waits for a turn any more
            raise

    def _spoken(self, prompt: str, settings: Settings, variants: list[str]) -> Iterator[dict[str, Answer]]:
        """The runtime's answers; its refusals as Gradio's, which reach the page and the client alike."""
        try:
            self.runtime.check(prompt, settings)
            self.runtime.settled.wait()  # here too: inside of stream it would be paid as GPU time
            yield from self.stream(prompt, settings, variants)
        except HfsdError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    def _recorded(self, at: int) -> list[Any]:
        example = self.spec.examples[at]
        cells = []
        for variant in self.spec.ids:
            known = variant in example.answers
            cells += [
                looks.safe(example.answers.get(variant, "")),
                looks.foot("recorded by the run" if known else "not recorded"),
            ]
        return [
            example.prompt,
            *cells,
            gr.Markdown(f"**Reference answer**\n\n{looks.safe(example.reference)}", visible=True),
        ]

    def _cells(self, answers: dict[str, Answer]) -> list[str]:
        cells = []
        for variant in self.spec.ids:
            answer = answers.get(variant)
            cells += [looks.safe(answer.text), looks.stats(answer)] if answer else ["", looks.foot("not asked")]
        return cells


def _plain(answer: Answer) -> dict[str, Any]:
    plain = {"text": answer.text, "tokens": answer.tokens, "tokens_per_second": round(answer.tokens_per_second, 2)}
    return {**plain, "error": answer.error} if answer.error else plain


def _short(prompt: str, length: int = 70) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def serve(spec: Spec, port: int | None, share: bool, open_browser: bool) -> None:
    """Serves the page until it is interrupted; models load meanwhile."""
    runtime = Runtime(spec, HERE)
    page = Page(runtime).build()
    if os.environ.get("SPACES_ZERO_GPU"):
        runtime.load()  # ZeroGPU moves what is on its GPU when the page is launched, and only that
    else:
        runtime.load_in_background()
    page.launch(
        server_name="0.0.0.0" if os.environ.get("SPACE_ID") else "127.0.0.1",
        server_port=port,
        share=share,
        inbrowser=open_browser,
        ssr_mode=False,
        theme=_theme(),
        css=looks.css(spec.ids),
        footer_links=["api", "settings"],
        run_history=False,  # visitors' prompts are theirs
        show_error=True,
    )


def _theme() -> gr.themes.Base:
    """The reader's own fonts, and quiet text dark enough to read: 4.5:1 on both backgrounds."""
    fonts = {"font": ["ui-sans-serif", "system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    theme = gr.themes.Default(primary_hue="blue", neutral_hue="slate", **fonts)
    return theme.set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        block_info_text_color="*neutral_500",
        block_info_text_color_dark="*neutral_400",
    )


def main() -> int:
    """Parses the command line and serves."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, help="port to listen on; by default the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="also ask gradio.live for a public address")
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    given = parser.parse_args()
    try:
        serve(read_spec(HERE / "family.json"), given.port, given.share, given.open)
    except HfsdError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:  # Gradio's word for a port that is taken
        print(f"error: {error}; give another --port", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
