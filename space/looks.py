"""What the page looks like: accent colours, names, and text that is safe to render."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from runtime import Answer, Progress, Spec, arm_of

from hfsd.figures import COLOURS
from hfsd.text import count, plural

NAMES = {
    "original": "Original",
    "pruned": "Pruned",
    "sft": "SFT",
    "self-distilled": "Self-distilled",
    "merged": "Merged",
}
WHAT = {
    "original": "unpruned",
    "pruned": "nothing trained",
    "sft": "tuned on reference answers",
    "self-distilled": "tuned on the original's words",
}
NEUTRAL = "#767676"  # 4.5:1 against white and against the dark page
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CODE = re.compile(r"(```.*?(?:```|\Z)|`[^`\n]+`)", re.DOTALL)

CSS = """
.gradio-container { max-width: 1240px !important; margin: 0 auto; }
.columns { flex-wrap: wrap; align-items: stretch; }
.columns > .answer { border-style: solid; border-width: 5px 1px 1px;
  border-color: var(--accent) var(--border-color-primary) var(--border-color-primary);
  border-radius: 8px; padding: 14px; background: var(--block-background-fill); gap: 10px; }
.answer .html-container, #loading .html-container { padding: 0 !important; }
.answer .who h3 { margin: 0; font-size: 1.1rem; font-weight: 600; color: var(--body-text-color); }
.answer .who div, .answer .stats, .quiet { color: var(--body-text-color-subdued); font-size: .875rem; }
.answer .words { overflow-wrap: anywhere; min-height: 5rem; flex-grow: 1; }
.answer .words pre { white-space: pre-wrap; }
.answer .words h1, .answer .words h2, .answer .words h3, .answer .words h4 { font-size: 1rem; margin: .4rem 0; }
.answer .stats { border-top: 1px solid var(--border-color-primary); padding-top: 6px;
  font-variant-numeric: tabular-nums; }
.failed { color: var(--error-text-color); font-weight: 600; }
.loading { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; font-size: .9rem; }
.loading progress { width: 160px; height: 10px; accent-color: var(--color-accent); }
@media (max-width: 640px) { .gradio-container > main { padding: 12px !important; } }
"""


def css(variants: Sequence[str]) -> str:
    """The style sheet, with one accent colour per arm."""
    arms = sorted({arm_of(v) for v in variants})
    return CSS + "".join(f".arm-{arm} {{ --accent: {COLOURS.get(arm, NEUTRAL)}; }}\n" for arm in arms)


def name_of(variant: str, spec: Spec) -> str:
    """`SFT`, or `SFT · gsm8k` where several variants share the arm."""
    arm = arm_of(variant)
    name = NAMES.get(arm, variant)
    crowded = sum(arm_of(v) == arm for v in spec.ids) > 1
    return f"{name} · {variant.removeprefix(arm).lstrip('-')}" if crowded and variant != arm else name


def head(variant: str, spec: Spec) -> str:
    """The head of a column: name, parameters, and what was done to the model."""
    arm = arm_of(variant)
    blocks = plural(spec.n_layers if arm == "original" else len(spec.kept), "block")
    size = f"{count(spec.params[variant])} parameters, {blocks}" if variant in spec.params else blocks
    lines = "".join(f"<div>{html.escape(line)}</div>" for line in (size, WHAT.get(arm, "")))
    return f'<div class="who"><h3>{html.escape(name_of(variant, spec))}</h3>{lines}</div>'


def stats(answer: Answer) -> str:
    """The foot of a column: tokens and speed, or why it failed."""
    if answer.error:
        return f'<div class="stats"><span class="failed">Failed:</span> {html.escape(answer.error)}</div>'
    if not answer.tokens:
        return foot("waiting for its turn")
    running = "" if answer.done else " …"
    silent = " · nothing to show" if answer.done and not answer.text else ""
    return foot(f"{plural(answer.tokens, 'token')} · {answer.tokens_per_second:.1f} tokens/s{running}{silent}")


def foot(text: str) -> str:
    """A plain line at the foot of a column."""
    return f'<div class="stats">{html.escape(text)}</div>'


def loading(progress: Progress) -> str:
    """The line that tells how far the models are."""
    if progress.error:
        why = html.escape(progress.error)
        return f'<div class="loading" role="alert"><span class="failed">The models did not load.</span> {why}</div>'
    if progress.ready:
        return '<div class="loading quiet" role="status">Models are loaded.</div>'
    return (
        f'<div class="loading" role="status"><progress aria-label="models loaded" value="{progress.step}" '
        f'max="{progress.steps}"></progress>Loading models: {html.escape(progress.doing)}</div>'
    )


def about(spec: Spec) -> str:
    """The About tab, as markdown."""
    lines = [
        f"## What was removed\n{safe(_sentence(spec.sentence))}",
        f"## What came of it\n{safe(spec.headline)}",
        "## The models",
    ]
    for variant in spec.ids:
        params = f", {count(spec.params[variant])} parameters" if variant in spec.params else ""
        lines.append(f"- **{safe(name_of(variant, spec))}** (`{variant}`){params}{_where(spec.repos.get(variant), '')}")
    if "dataset" in spec.repos:
        lines.append(f"- **Data**, reference and rewritten{_where(spec.repos['dataset'], 'datasets/')}")
    lines.append(
        "## How it works here\nOne set of weights is in memory: the pruned model is the original without the removed "
        "blocks, and each tuned model is a small adapter on it. Columns decode by turns; tokens/s counts a "
        "column's own time. Temperature 0 is greedy decoding; above 0 every column draws with the same seed."
    )
    return "\n\n".join(lines).replace("\n\n- ", "\n- ")


def safe(text: str) -> str:
    """Markdown of a model's text that holds no HTML and fetches no image, outside code (where both are inert).

    `#### 42` stays as it is written: it is the answer line that GSM8K is scored by, not a heading.
    """
    parts = CODE.split(text)
    for i in range(0, len(parts), 2):
        plain = parts[i].replace("&", "&amp;").replace("<", "&lt;").replace("![", "!\\[")
        parts[i] = re.sub(r"^(#{1,6})(?=\s*[-$\d])", r"\\\1", plain, flags=re.MULTILINE)
    return "".join(parts)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}."


def _where(repo: str | None, kind: str) -> str:
    """A link where the repo is a URL or a Hub id; a local name as it is."""
    if not repo:
        return ""
    if HUB_ID.fullmatch(repo):
        return f": [{repo}](https://huggingface.co/{kind}{repo})"
    return f": [{repo.removeprefix('https://')}]({repo})" if repo.startswith("https://") else f": `{repo}`"
