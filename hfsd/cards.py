"""Cards of models, data sets and Spaces: pure functions of a run's results. No network, no torch.

`facts` may hold, beside the results' own facts, which it overrides: `license`, `license_name`, `license_link`,
`language` (code or list), `quantization` and `source` (of an original that was read from a GGUF), `limits` (sentences
carried over from the original's card), `data_source`, `data_license`, `data_repos` (Hub ids of the source data),
`data_commits` (commit per Hub id of source data), `data_files` (file per configuration of the data set), `machine`,
`trust_remote_code`. What is missing is not made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hfsd import metadata, text
from hfsd.assets import assets
from hfsd.errors import BadRequest
from hfsd.findings import Results, VariantSummary
from hfsd.markdown import LOCAL_PATH, escape, fence, shorten, table, without_paths
from hfsd.metadata import original_repo, repo_of, validate
from hfsd.plain import printable
from hfsd.records import CONFIGS, TAUGHT, TRAINED_ARMS, Example, Rewrite, TrainReport, TrainSet, Variant

__all__ = ["dataset_card", "model_card", "pictures", "space_card", "validate"]

HUB = "https://huggingface.co"
DATA_FILES = {config: f"{config}.parquet" for config in reversed(CONFIGS)}
MEANINGS = {
    "self-distilled": "the original's own answers, and the reference answer where the rewrite was not acceptable",
    "reference": "the reference answers as they are: the same rows in the same order",
}
DROPPED = {
    "self-distilled": "the original's own answers; rows whose rewrite was not acceptable are left out",
    "reference": "the reference answers of the same rows in the same order",
}
COLUMNS = [
    ["column", "meaning"],
    ["id", "id of the row, equal in both configurations"],
    ["prompt", "the user's message"],
    ["completion", "the answer that is trained on"],
    ["rewritten", "whether the completion is the original's own text"],
    ["reason", "kept, or why the rewrite was not used"],
]
SHOWN_EXAMPLES = 8
SHOWN_CHARS = 1200
CITATION = """\
@misc{thangarasa2024selfdata,
  title         = {Self-Data Distillation for Recovering Quality in Pruned Large Language Models},
  author        = {Vithursan Thangarasa and Ganesh Venkatesh and Mike Lasby and Nish Sinnadurai and Sean Lie},
  year          = {2024},
  eprint        = {2410.09982},
  archivePrefix = {arXiv},
  url           = {https://arxiv.org/abs/2410.09982}
}"""


def pictures(results: Results) -> list[str]:
    """The report's pictures that every model card shows: they belong beside its README.md."""
    return ["recovery.png", *(["block_scores.png"] if results.scan and results.scan.scores else [])]


def model_card(results: Results, variant_id: str, repos: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """README.md of one variant's repo.

    Args:
        repos: Hub repo id per variant id, and of "dataset" and "space".
        facts: see the module's text.

    Raises:
        BadRequest: an unknown variant, no repo for it, or a repo id that the Hub would not take.
    """
    line = text.line_of(results, variant_id)
    if line is None:
        known = ", ".join(v.variant.id for v in results.variants)
        raise BadRequest(f"no variant {variant_id!r} among the results; there are: {known}")
    facts, repo = {**results.facts, **facts}, repo_of(repos, variant_id)
    arm, pictured = line.variant.arm, pictures(results)
    report = next((t for t in results.training if t.variant.id == variant_id), None)
    train_set = text.train_set_of(results, line.variant) if arm in TRAINED_ARMS else None
    drafted = replace(results, drafts=[d for d in results.drafts if d.variant == line.variant])
    refused = any(d.refused for d in drafted.drafts)
    mine = text.verdicts(results, variant_id) if arm not in ("original", "pruned") else []
    return _render(
        "model",
        metadata=metadata.of_model(results, line.variant, repos, facts),
        title=repo.split("/")[-1],
        repo=repo,
        summary=_summary(results, line, repos, facts),
        verdicts=" ".join(mine),
        recovery_picture=pictured[0],
        scores_picture="block_scores.png" if "block_scores.png" in pictured else "",
        table=text.table(results),
        notes=text.notes(results),
        paired=text.paired_table(results),
        paired_note=text.PAIRED_NOTE,
        removed="" if arm == "original" else results.plan.sentence,
        why=without_paths(results.plan.why),
        param_cut=f"{100 * results.param_cut:.2f}",
        flop_cut=f"{100 * results.matmul_flop_cut:.2f}",
        draft_for="" if arm == "original" or refused else original_repo(results, repos) or "",
        drafts=text.draft_table(drafted),
        draft_notes=text.draft_notes(drafted),
        data_sentence=_training_data(results, line.variant, train_set),
        reasons=text.reasons_table(train_set) if train_set and arm == "self-distilled" else [],
        training_sentence=_training_sentence(results, report) if report else "",
        training=_hyperparameters(report) if report else [],
        machine=facts.get("machine"),
        cost=_cost(results, line, report),
        running=text.cost_table(results),
        running_notes=text.cost_notes(results),
        losses=[] if arm == "original" else text.losses(results, variant_id),
        carried=_carried(facts, arm),
        license_sentence=_license_sentence(facts, "the original model", "license"),
        original=_original_name(results),
        **_recipe(results),
    )


def dataset_card(
    results: Results, repos: Mapping[str, str], examples: Sequence[tuple[Example, Rewrite]], drawn: Sequence[str] = ()
) -> str:
    """README.md of the rewritten set, with the examples that name no local path.

    Args:
        drawn: pictures beside README.md of how far the rewrites are from the references.

    Raises:
        BadRequest: no repo for it, or no rewritten set in the results.
    """
    repo = repo_of(repos, "dataset")
    if not results.train_sets:
        raise BadRequest(f"run {results.name!r} has no rewritten data set to make a card for; run `hfsd rewrite` first")
    names = " and ".join(sorted(results.train_sets))
    source = results.facts.get("data_source")
    files = dict(results.facts.get("data_files") or DATA_FILES)
    meanings = DROPPED if any(s.on_reject == "drop" for s in results.train_sets.values()) else MEANINGS
    shown = [(e, r) for e, r in examples if not LOCAL_PATH.search(f"{e.prompt}\n{e.reference}\n{r.text}")]
    return _render(
        "dataset",
        metadata=metadata.of_dataset(results, repos, files),
        title=repo.split("/")[-1],
        summary=(
            f"The fine-tuning set {escape(names)}{f' ({escape(without_paths(source))})' if source else ''} with its "
            f"answers rewritten by {_rewriter(results, repos)} in its own words, where the rewrite is acceptable "
            "(self-data distillation), made to recover a pruned copy of that model."
        ),
        data_commits=[
            f"{_link(repo, 'datasets/')} at commit {escape(commit)}"
            for repo, commit in sorted((results.facts.get("data_commits") or {}).items())
        ],
        contents=[
            *(f"configuration {escape(name)}: {_meaning(name, meanings)}" for name in files),
            "rewrites.jsonl (of several data sets, one for each): every row's rewrite, used or not, with the reason, "
            "tokens, engine, model and sampling",
        ],
        columns=COLUMNS,
        sets=[
            (n, text.data_sentence(n, s), text.reasons_table(s), s.asked) for n, s in sorted(results.train_sets.items())
        ],
        pictures=drawn,
        examples=[_example(e, r) for e, r in shown[:SHOWN_EXAMPLES]],
        headline=text.headline(results),
        license_sentence=_license_sentence(results.facts, "the source data", "data_license"),
        **_recipe(results),
    )


def space_card(results: Results, repos: Mapping[str, str]) -> str:
    """README.md of the Space: its configuration and a short text.

    Raises:
        BadRequest: no repo for it.
    """
    repo_of(repos, "space")
    links = [f"{escape(v.variant.id)}: {_link(repos[v.variant.id])}" for v in results.variants if v.variant.id in repos]
    links += [f"rewritten data: {_link(repos['dataset'], 'datasets/')}"] if "dataset" in repos else []
    return _render(
        "space",
        metadata=metadata.of_space(results, repos),
        title=f"{results.name}: pruned and recovered",
        headline=text.headline(results),
        links=links,
    )


def _meaning(name: str, meanings: Mapping[str, str]) -> str:
    """Of a configuration, which is a text, or DATA-TEXT where there are several data sets."""
    return next((said for text_, said in meanings.items() if name == text_ or name.endswith(f"-{text_}")), "see above")


def _render(template: str, **values: Any) -> str:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(assets("cards")),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML: every value goes through a filter below
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(esc=escape, fence=lambda t, language="text": fence(t, language), table=table)
    return environment.get_template(f"{template}.md.j2").render(citation=CITATION, **values)


def _link(repo: str | None, kind: str = "") -> str:
    """A link to a repo; a name without a namespace (not published yet) is no address."""
    if not repo:
        return ""
    return f"[{repo}]({HUB}/{kind}{repo})" if "/" in repo else f"`{repo}`"


def _original_name(results: Results) -> str:
    ref = results.original
    return without_paths(ref.repo) + (f" at {ref.revision}" if ref.revision else "")


def _rewriter(results: Results, repos: Mapping[str, str]) -> str:
    """The original with the commit, or the file, that it was read from. Markdown."""
    repo, ref = original_repo(results, repos), results.original
    if repo is None:
        return escape(_original_name(results))
    if repo != ref.repo:
        return f"{_link(repo)} (read from {escape(_original_name(results))})"
    return f"{_link(repo)} at commit {escape(ref.revision)}" if ref.revision else _link(repo)


def _summary(results: Results, line: VariantSummary, repos: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """One or two sentences: what the model is and how much it recovers. Markdown."""
    arm = line.variant.arm
    if arm == "original":
        return _original_summary(line, facts, results)
    base = _link(original_repo(results, repos)) or escape(_original_name(results))
    what = f"{base} without {escape(text.cut_text(results))}"
    score = escape(text.recovery_text(results, line))
    if arm == "pruned":
        return f"This is {what}, and with nothing trained after the cut. It keeps {score}."
    data = escape(line.variant.data or "its data set")
    how = {
        "sft": f"fine-tuned on the reference answers of {data} as they are",
        "self-distilled": f"fine-tuned on answers to {data} that the original rewrote in its own words "
        "(self-data distillation)",
        "sdd+kd": f"fine-tuned on the same rewrites of {data} towards the original's distribution over the next token "
        "(self-data distillation with logit distillation)",
        "on-policy": f"fine-tuned on its own answers to {data}, towards the original's distribution on them "
        "(on-policy distillation)",
    }.get(arm) or escape(results.merges[line.variant.id].sentence)
    return f"This is {what}, {how}. It recovers {score}."


def _original_summary(line: VariantSummary, facts: Mapping[str, Any], results: Results) -> str:
    parts = [
        f"This is the unpruned original ({text.count(line.params)} parameters) that the pruned models derive from."
    ]
    source = without_paths(str(facts.get("source") or _original_name(results)))
    parts.append(f"It was read from {escape(source)}.")
    if facts.get("quantization"):
        parts.append(
            f"That file is quantised: {escape(facts['quantization'])}. The dequantised weights here are not those of "
            "the full-precision release."
        )
    return " ".join(parts)


def _training_data(results: Results, variant: Variant, train_set: TrainSet | None) -> str:
    name = variant.data or "the data set"
    if train_set is None:
        return f"{name}: the results hold no record of the data." if variant.arm in TRAINED_ARMS else ""
    if variant.arm == "sft":
        return f"{name}: {text.plural(train_set.trained_rows, 'row')} with the reference answers as they are."
    return text.data_sentence(name, train_set)


def _training_sentence(results: Results, report: TrainReport) -> str:
    if not report.steps:
        return "The adapter was not trained in this run: it was given, and merged into the pruned model."
    others = [t.variant for t in results.training if t.fairness and t.fairness == report.fairness]
    same = [v.id for v in others if v.id != report.variant.id and v.arm not in TAUGHT]
    what = "Start, rows, their order and steps are" if report.variant.arm in TAUGHT else "Everything but the text is"
    shared = f" {what} shared with {' and '.join(same)}." if same else ""
    how = {"full": "Every weight was trained.", "dora": "A DoRA adapter, merged into the weights."}
    how["qlora"] = "A LoRA adapter, trained on a 4-bit copy and merged into the unquantised weights."
    return f"{how.get(report.method, 'A LoRA adapter, merged into the weights.')}{shared}"


def _hyperparameters(report: TrainReport) -> list[list[str]]:
    rows = [
        ["trained parameters", text.count(report.trained_params)],
        ["rows", f"{report.rows:,}"],
        ["optimizer steps", f"{report.steps:,}"],
        ["trained tokens", f"{report.tokens:,}"],
    ]
    told = sorted(printable(report.hyperparameters).items())
    return [["what", "value"], *rows, *([key, without_paths(value)] for key, value in told)]


def _cost(results: Results, line: VariantSummary, report: TrainReport | None) -> list[list[str]]:
    rows = [["parameters", text.count(line.params)]]
    if report:
        rows += [["training of this variant", text.duration(report.seconds)]]
        if report.peak_bytes:
            rows += [["peak memory of the process, up to the end of training", text.size(report.peak_bytes)]]
    rows += [[f"the run: {step}", text.duration(s)] for step, s in text.stages(results)]
    return [["what", "cost"], *rows]


def _carried(facts: Mapping[str, Any], arm: str) -> list[str]:
    """Limits that come with the original, in plain text."""
    lines = [without_paths(str(limit)) for limit in facts.get("limits") or []]
    if facts.get("quantization") and arm != "original":
        lines.append(f"The original was read from a quantised file: {facts['quantization']}.")
    if facts.get("trust_remote_code"):
        lines.append("The original brings code of its own (trust_remote_code), which the run was told to execute.")
    return lines


def _license_sentence(facts: Mapping[str, Any], whose: str, key: str) -> str:
    if facts.get(key):
        name = facts.get("license_name") if key == "license" else None
        return f"Inherited from {whose}: {escape(facts[key])}{f' ({escape(name)})' if name else ''}."
    unknown = f"The license of {whose} is not known to this run, so that none is stated here."
    return f"{unknown} Find it out before you use this."


def _recipe(results: Results) -> dict[str, Any]:
    recipe = without_paths(results.recipe)
    return {"recipe": recipe, "masked": recipe.strip() != results.recipe.strip()}


def _example(example: Example, rewrite: Rewrite) -> dict[str, str]:
    return {
        "id": example.id,
        "prompt": shorten(example.prompt, SHOWN_CHARS),
        "reference": shorten(example.reference, SHOWN_CHARS),
        "text": shorten(rewrite.text, SHOWN_CHARS),
        "verdict": "used" if rewrite.kept else f"not used: {text.REASONS.get(rewrite.reason, rewrite.reason)}",
    }
