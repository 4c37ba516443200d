"""Sentences, lists and tables of cards that the report does not have. Markdown, but where it says plain text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from hfsd import text
from hfsd.findings import Draft, Results, VariantSummary
from hfsd.markdown import escape, without_paths
from hfsd.metadata import HUB, original_repo
from hfsd.plain import printable
from hfsd.records import TAUGHT, TRAINED_ARMS, TrainReport, TrainSet, Variant
from hfsd.stats import key_of, over_prompts

_ADDRESS = re.compile(r"https?://[\w./~%#?=&+:@,;-]+")
# How an arm was made, with the place of its data set open.
HOW = {
    "sft": "fine-tuned on the reference answers of {} as they are",
    "self-distilled": "fine-tuned on answers to {} that the original rewrote in its own words (self-data distillation)",
    "sdd+kd": "fine-tuned on the same rewrites of {} towards the original's distribution over the next token "
    "(self-data distillation with logit distillation)",
    "on-policy": "fine-tuned on its own answers to {}, towards the original's distribution on them "
    "(on-policy distillation)",
}
WEIGHTS = {
    "full": "Every weight was trained.",
    "dora": "A DoRA adapter, merged into the weights.",
    "qlora": "A LoRA adapter, trained on a 4-bit copy and merged into the unquantised weights.",
}


def link(repo: str | None, kind: str = "") -> str:
    """A link to a repo; a name without a namespace (not published yet) is no address."""
    if not repo:
        return ""
    return f"[{escape(repo)}]({HUB}/{kind}{repo})" if "/" in repo else f"`{repo}`"


def family(results: Results, repos: Mapping[str, str], but: str = "") -> list[str]:
    """Links to the repos of the family in reading order, without the one that they stand in."""
    places = {"original": original_repo(results, repos)} | {
        v.variant.id: repos.get(v.variant.id) for v in results.variants if v.variant.arm != "original"
    }
    lines = [f"{escape(key)}: {link(repo)}" for key, repo in places.items() if repo and key != but]
    for key, named, kind in (("dataset", "rewritten data", "datasets/"), ("space", "side by side", "spaces/")):
        if key in repos and key != but:
            lines.append(f"{named}: {link(repos[key], kind)}")
    return lines


def original_name(results: Results) -> str:
    """The original as the run read it, in plain text."""
    ref = results.original
    return without_paths(ref.repo) + (f" at {ref.revision}" if ref.revision else "")


def rewriter(results: Results, repos: Mapping[str, str]) -> str:
    """The original with the commit, or the file, that it was read from."""
    repo, ref = original_repo(results, repos), results.original
    if repo is None:
        return escape(original_name(results))
    if repo != ref.repo:
        return f"{link(repo)} (read from {escape(original_name(results))})"
    return f"{link(repo)} at commit {escape(ref.revision)}" if ref.revision else link(repo)


def summary(results: Results, line: VariantSummary, repos: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """One sentence: what the model is and how much it recovers, with its interval."""
    arm = line.variant.arm
    if arm == "original":
        return _original_summary(line, facts, results)
    base = link(original_repo(results, repos)) or escape(original_name(results))
    what = f"This is {base} without {escape(text.cut_text(results))}"
    score = escape(text.recovery_text(results, line))
    if arm == "pruned":
        return f"{what}, with nothing trained after the cut: it keeps {score}."
    data = escape(line.variant.data or "its data set")
    how = HOW[arm].format(data) if arm in HOW else escape(results.merges[line.variant.id].sentence)
    return f"{what}, {how}: it recovers {score}."


def _original_summary(line: VariantSummary, facts: Mapping[str, Any], results: Results) -> str:
    source = without_paths(str(facts.get("source") or original_name(results)))
    parts = [
        f"This is the unpruned original ({text.count(line.params)} parameters) that the pruned models derive from.",
        f"It was read from {escape(source)}.",
    ]
    if facts.get("quantization"):
        parts.append(
            f"That file is quantised: {escape(facts['quantization'])}. The dequantised weights here are not those of "
            "the full-precision release."
        )
    return " ".join(parts)


def cut_loss(results: Results) -> str:
    """What the cut costs before any training, in plain text; empty for a cut by hand."""
    scores = results.plan.scores
    if "loss" not in scores or "original_loss" not in scores:
        return ""
    return (
        f"Loss on calibration text kept apart: {scores['loss']:.2f} nats per token without these blocks and before any "
        f"training, {scores['original_loss']:.2f} with them."
    )


def drafting(drafts: Sequence[Draft]) -> str:
    """What a variant was worth as a draft model, in plain text."""
    found = next((d for d in drafts if not d.refused), None)
    if found is None:
        return "It was not measured here: it depends on how often the drafts are accepted, and on the device."
    share = over_prompts(found.acceptance, found.acceptance_stderr, found.prompts, top=1.0)
    said = f"The original takes {text.estimate_text(share, 100, unit='%')} of the tokens drafted for its own samples."
    speed = found.speedup
    if speed is None or speed.low is None or speed.high is None:
        return f"{said} The speed-up was not measured here."
    verdict = "no clear gain"
    if speed.low > 1:
        verdict = "faster"
    elif speed.high < 1:
        verdict = "slower, so that it is of no use as a draft there"
    return (
        f"{said} Greedy decoding ran at {speed.value:.2f} x its speed without a draft ({speed.low:.2f} to "
        f"{speed.high:.2f} by prompt) on the machine of this run: {verdict}."
    )


def training_data(results: Results, variant: Variant, train_set: TrainSet | None) -> str:
    """What an arm was trained on, in plain text."""
    name = variant.data or "the data set"
    if train_set is None:
        return f"{name}: the results hold no record of the data." if variant.arm in TRAINED_ARMS else ""
    if variant.arm == "sft":
        return f"{name}: {text.plural(train_set.trained_rows, 'row')} with the reference answers as they are."
    return text.data_sentence(name, train_set)


def training(results: Results, report: TrainReport) -> str:
    """What was trained, and what is shared with other arms, in plain text."""
    if not report.steps:
        return "The adapter was not trained in this run: it was given, and merged into the pruned model."
    others = [t.variant for t in results.training if t.fairness and t.fairness == report.fairness]
    same = [v.id for v in others if v.id != report.variant.id and v.arm not in TAUGHT]
    what = "Start, rows, their order and steps are" if report.variant.arm in TAUGHT else "Everything but the text is"
    shared = f" {what} shared with {' and '.join(same)}." if same else ""
    return f"{WEIGHTS.get(report.method, 'A LoRA adapter, merged into the weights.')}{shared}"


def hyperparameters(report: TrainReport) -> list[list[str]]:
    """Table of what a training was given, and of its size."""
    rows = [
        ["trained parameters", text.count(report.trained_params)],
        ["rows", f"{report.rows:,}"],
        ["optimizer steps", f"{report.steps:,}"],
        ["trained tokens", f"{report.tokens:,}"],
    ]
    told = sorted(printable(report.hyperparameters).items())
    return [["what", "value"], *rows, *([key, without_paths(value)] for key, value in told)]


def cost(results: Results, line: VariantSummary, report: TrainReport | None) -> list[list[str]]:
    """Table of what making a variant cost, and every step of the run."""
    rows = [["parameters", text.count(line.params)]]
    if report:
        rows += [["training of this variant", text.duration(report.seconds)]]
        if report.peak_bytes:
            rows += [["peak memory of the process, up to the end of training", text.size(report.peak_bytes)]]
    rows += [[f"the run: {step}", text.duration(s)] for step, s in text.stages(results)]
    return [["what", "cost"], *rows]


def losses(results: Results, variant_id: str) -> list[str]:
    """Which tasks did not come back, then each task's numbers, in plain text."""
    found = {(p.task, p.metric, p.filter): p for p in results.paired if (p.first, p.second) == (variant_id, "original")}
    said = {"worse": "Lost against the original", "not told apart": "Not told apart from the original at this n"}
    said["better"] = "Better than the original"
    lines = []
    for verdict, what in said.items():
        tasks = [t for t in results.tasks if key_of(t) in found and found[key_of(t)].verdict == verdict]
        if tasks:
            lines.append(f"{what}: {', '.join(text.label(results, t) for t in tasks)}.")
    return lines + text.losses(results, variant_id)


def limits(facts: Mapping[str, Any], arm: str) -> list[str]:
    """Limits that come with how the original was read, in plain text."""
    lines = []
    if facts.get("quantization") and arm != "original":
        lines.append(f"The original was read from a quantised file: {facts['quantization']}.")
    if facts.get("trust_remote_code"):
        lines.append("The original brings code of its own (trust_remote_code), which the run was told to execute.")
    return lines


def license_sentence(facts: Mapping[str, Any], whose: str, key: str) -> str:
    """Under which license, and where its text is."""
    if not facts.get(key):
        unknown = f"The license of {whose} is not known to this run, so that none is stated here."
        return f"{unknown} Find it out before you use this."
    name, address = (facts.get(k) if key == "license" else None for k in ("license_name", "license_link"))
    said = f"Inherited from {whose}: {escape(facts[key])}{f' ({escape(name)})' if name else ''}"
    if address:
        shown = f"[its text]({address})" if _ADDRESS.fullmatch(address) else escape(address)
        said += f", {shown}"
    return f"{said}."


def made_with(facts: Mapping[str, Any]) -> str:
    """The versions behind the numbers, in plain text; empty where they were not recorded."""
    packages = dict(facts.get("packages") or {})
    own = f"hfsd {packages.pop('hfsd', '')}".strip()
    commit = f" at commit {facts['git']}" if facts.get("git") else ""
    others = ", ".join(f"{name} {version}" for name, version in sorted(packages.items()))
    return f"Made with {own}{commit}{f', {others}' if others else ''}." if commit or others else ""
