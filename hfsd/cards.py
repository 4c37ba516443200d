"""Cards of models, data sets and Spaces: pure functions of a run's results. No network, no torch.

`facts` may hold, beside the results' own facts, which it overrides: `license`, `license_name`, `license_link`,
`language` (codes), `quantization` and `source` (of an original that was read from a GGUF), `limits` (paragraphs carried
over from the original's card, see `hfsd.original_card`), `data_source`, `data_license`, `data_repos` (Hub ids of the
source data), `data_commits` (commit per Hub id of source data), `data_files` (file per configuration of the data set),
`machine`, `trust_remote_code`, `packages` and `git`. What is missing is not made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from hfsd import card_text, metadata, text
from hfsd.assets import assets
from hfsd.errors import BadRequest
from hfsd.findings import Results
from hfsd.markdown import LOCAL_PATH, escape, fence, shorten, table, without_paths
from hfsd.metadata import eval_results, original_repo, repo_of, validate
from hfsd.records import CONFIGS, TRAINED_ARMS, Example, Rewrite

__all__ = ["dataset_card", "eval_results", "model_card", "pictures", "shown", "space_card", "validate"]

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
SHOWN_USED, SHOWN_NOT = 2, 1  # rows of each data set
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
    return _render(
        "model",
        metadata=metadata.of_model(results, line.variant, repos, facts),
        title=repo.split("/")[-1],
        repo=repo,
        variant=variant_id,
        chosen=arm not in ("original", "pruned"),
        family_repo=repos.get("pruned", "") if arm == "original" else repo,
        summary=card_text.summary(results, line, repos, facts),
        family=card_text.family(results, repos, variant_id),
        verdicts=text.verdicts(results, variant_id) if arm not in ("original", "pruned") else [],
        recovery_picture=pictured[0],
        scores_picture="block_scores.png" if "block_scores.png" in pictured else "",
        table=text.table(results),
        notes=text.notes(results),
        paired=text.paired_table(results),
        paired_note=text.PAIRED_NOTE,
        removed="" if arm == "original" else results.plan.sentence,
        why=without_paths(results.plan.why),
        cut_loss=card_text.cut_loss(results),
        param_cut=f"{100 * results.param_cut:.2f}",
        flop_cut=f"{100 * results.matmul_flop_cut:.2f}",
        remote_code=bool(facts.get("trust_remote_code")),
        adapter=_adapter(repos, variant_id, bool(report and report.adapter)),
        draft_for="" if arm == "original" or refused else original_repo(results, repos) or "",
        drafting=card_text.drafting(drafted.drafts),
        drafts=text.draft_table(drafted),
        draft_notes=text.draft_notes(drafted),
        data_repo=card_text.link(repos.get("dataset"), "datasets/") if report else "",
        data_sentence=card_text.training_data(results, line.variant, train_set),
        reasons=text.reasons_table(train_set) if train_set and arm == "self-distilled" else [],
        training_sentence=card_text.training(results, report) if report else "",
        training=card_text.hyperparameters(report) if report else [],
        machine=facts.get("machine"),
        cost=card_text.cost(results, line, report),
        running=text.cost_table(results),
        running_notes=text.cost_notes(results),
        losses=[] if arm == "original" else card_text.losses(results, variant_id),
        limits=card_text.limits(facts, arm),
        carried=[without_paths(str(said)) for said in facts.get("limits") or []],
        license_sentence=card_text.license_sentence(facts, "the original model", "license"),
        **_origin(results, facts),
    )


def _adapter(repos: Mapping[str, str], variant_id: str, trained: bool) -> dict[str, str] | None:
    """Where the adapter alone is, and the pruned model that it belongs on; None without either."""
    if not trained or "pruned" not in repos:
        return None
    own = repos.get(f"{variant_id}/adapter")
    place = {"repo": own, "folder": ""} if own else {"repo": repo_of(repos, variant_id), "folder": "adapter"}
    return {**place, "base": repo_of(repos, "pruned")}


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
    facts = results.facts
    source = facts.get("data_source")
    files = dict(facts.get("data_files") or DATA_FILES)
    meanings = DROPPED if any(s.on_reject == "drop" for s in results.train_sets.values()) else MEANINGS
    told = [(e, r) for e, r in examples if not LOCAL_PATH.search(f"{e.prompt}\n{e.reference}\n{r.text}")]
    bare = len(results.train_sets) == 1
    rewrites = ["rewrites.jsonl"] if bare else [f"{name}-rewrites.jsonl" for name in sorted(results.train_sets)]
    return _render(
        "dataset",
        metadata=metadata.of_dataset(results, repos, files),
        title=repo.split("/")[-1],
        repo=repo,
        configuration=next(iter(files)),
        summary=(
            f"The fine-tuning set {escape(names)}{f' ({escape(without_paths(source))})' if source else ''} with its "
            f"answers rewritten by {card_text.rewriter(results, repos)} in its own words, where the rewrite is "
            "acceptable (self-data distillation), made to recover a pruned copy of that model."
        ),
        family=card_text.family(results, repos, "dataset"),
        data_commits=[
            f"{card_text.link(repo, 'datasets/')} at commit {escape(commit)}"
            for repo, commit in sorted((facts.get("data_commits") or {}).items())
        ],
        contents=[
            *(f"configuration {name}: {_meaning(name, meanings)}" for name in files),
            f"{' and '.join(rewrites)}: every row's rewrite, used or not, with the reason, tokens, engine, model and "
            "sampling",
        ],
        columns=COLUMNS,
        sets=[
            (n, text.data_sentence(n, s), text.reasons_table(s), s.asked) for n, s in sorted(results.train_sets.items())
        ],
        pictures=drawn,
        examples=[_example(e, r) for e, r in told[:SHOWN_EXAMPLES]],
        headline=text.headline(results),
        license_sentence=card_text.license_sentence(facts, "the source data", "data_license"),
        model_license=facts.get("license"),
        **_origin(results, facts),
    )


def shown(examples: Sequence[tuple[Example, Rewrite]]) -> list[tuple[Example, Rewrite]]:
    """The rows of a data set that its card shows: the first ones whose rewrite is used, and the first that is not."""
    used = [pair for pair in examples if pair[1].kept]
    return used[:SHOWN_USED] + [pair for pair in examples if not pair[1].kept][:SHOWN_NOT]


def space_card(results: Results, repos: Mapping[str, str]) -> str:
    """README.md of the Space: its configuration and a short text.

    Raises:
        BadRequest: no repo for it.
    """
    repo_of(repos, "space")
    return _render(
        "space",
        metadata=metadata.of_space(results, repos),
        title=f"{results.name}: pruned and recovered",
        removed=results.plan.sentence,
        headline=text.headline(results),
        family=card_text.family(results, repos, "space"),
        license_sentence=card_text.license_sentence(results.facts, "the original model", "license"),
    )


def _meaning(name: str, meanings: Mapping[str, str]) -> str:
    """Of a configuration, which is a text, or DATA-TEXT where there are several data sets."""
    return next((said for text_, said in meanings.items() if name == text_ or name.endswith(f"-{text_}")), "see above")


def _render(template: str, **values: Any) -> str:
    return str(_environment(assets("cards")).get_template(f"{template}.md.j2").render(citation=CITATION, **values))


@cache  # templates are read and compiled once
def _environment(folder: Path) -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        autoescape=False,  # Markdown, not HTML: every value goes through a filter below
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(esc=escape, fence=lambda t, language="text": fence(t, language), table=table)
    return environment


def _origin(results: Results, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What every card says of where it came from; a recipe that named folders of its machine says so."""
    recipe = without_paths(results.recipe)
    return {
        "recipe": recipe,
        "masked": recipe.strip() != results.recipe.strip(),
        "original": card_text.original_name(results),
        "made_with": card_text.made_with(facts),
    }


def _example(example: Example, rewrite: Rewrite) -> dict[str, str]:
    return {
        "id": example.id,
        "prompt": shorten(example.prompt, SHOWN_CHARS),
        "reference": shorten(example.reference, SHOWN_CHARS),
        "text": shorten(rewrite.text, SHOWN_CHARS),
        "verdict": "used" if rewrite.kept else f"not used: {text.REASONS.get(rewrite.reason, rewrite.reason)}",
    }
