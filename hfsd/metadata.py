"""The YAML front matter of cards by the Hub's conventions, and the checks that the Hub's client does not make."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from hfsd.errors import BadRequest
from hfsd.findings import Results
from hfsd.markdown import LOCAL_PATH
from hfsd.records import TRAINED_ARMS, Variant
from hfsd.text import label

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?"
REPO_ID = re.compile(rf"(?=.{{1,96}}$)(?!.*(?:--|\.\.)){_NAME}(?:/{_NAME})?")
HUB = "https://huggingface.co"
COMMIT = re.compile(r"[0-9a-f]{40}")
GRADIO = "6.31.0"  # as pinned in space/requirements.txt
RELATIONS = ("adapter", "merge", "quantized", "finetune")
# Identifiers of https://huggingface.co/docs/hub/repositories-licenses that models and data sets commonly carry.
_LICENSES = """
    apache-2.0 mit openrail openrail++ bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl apple-ascl apple-amlr
    mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr
    deepfloyd-if-license fair-noncommercial-research-license intel-research h-research llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = frozenset(_LICENSES.split())
DISTILLED = ("self-distilled", "sdd+kd")  # arms trained on the original's own words
METRICS = {"acc": "accuracy", "acc_norm": "accuracy"}  # lm-eval's names of what the Hub calls accuracy
SIZES = (
    (1_000, "n<1K"),
    (10_000, "1K<n<10K"),
    (100_000, "10K<n<100K"),
    (1_000_000, "100K<n<1M"),
    (10_000_000, "1M<n<10M"),
)
GSM8K = ("strict-match", 1319)  # the filter that leaderboards take, and the documents of the whole test split
SPACE_TITLE = 40  # characters that a Space's tile shows
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)
_FENCED = re.compile(r"^(`{3,})[^\n]*\n.*?^\1$", re.DOTALL | re.MULTILINE)
_NOTHING = re.compile(r"(?:\||:|\bof|\bby|\bat) *`?(None|nan|NaN|-?inf)`?(?=[ |.,;)]|$)", re.MULTILINE)


def repo_of(repos: Mapping[str, str], key: str) -> str:
    """The repo id of a variant, "dataset" or "space".

    Raises:
        BadRequest: there is none, or the Hub would not take it.
    """
    repo = repos.get(key)
    if repo is None:
        raise BadRequest(f"no repo id for {key!r}; ids are given for {', '.join(sorted(repos)) or 'nothing'}")
    if not REPO_ID.fullmatch(repo):
        raise BadRequest(f"repo id of {key!r} is {repo!r}; the Hub takes NAMESPACE/NAME of letters, digits, - _ .")
    return repo


def original_repo(results: Results, repos: Mapping[str, str]) -> str | None:
    """Where the original is on the Hub: published by this run, or the commit it was read from; None if nowhere."""
    if "original" in repos:
        return repo_of(repos, "original")
    ref = results.original
    if not REPO_ID.fullmatch(ref.repo):
        return None
    on_hub = COMMIT.fullmatch(ref.revision) if ref.revision else "/" in ref.repo
    return ref.repo if on_hub else None


def base_model(results: Results, variant: Variant, repos: Mapping[str, str]) -> str | list[str] | None:
    """What a variant derives from: the original, for its arms the pruned one, for a merge the arms that it is of."""
    if variant.arm == "original":
        return original_repo(results, {})  # what it was read from; a GGUF in a package is no repo
    parts = results.merges[variant.id].parts if variant.id in results.merges else ()
    if parts and all(part in repos for part in parts):
        return [repo_of(repos, part) for part in parts]
    if variant.arm != "pruned" and "pruned" in repos:
        return repo_of(repos, "pruned")
    return original_repo(results, repos)


def _tags(results: Results, variant: Variant) -> list[str]:
    taught = [variant.id, *(results.merges[variant.id].parts if variant.id in results.merges else ())]
    distilled = any(v.variant.id in taught and v.variant.arm in DISTILLED for v in results.variants)
    return [
        "hfsd",
        *(["layer-pruning"] if variant.arm != "original" else []),
        *(["self-data-distillation"] if distilled else []),
    ]


def of_model(results: Results, variant: Variant, repos: Mapping[str, str], facts: Mapping[str, Any]) -> str:
    """Front matter of a model card."""
    from huggingface_hub import ModelCardData

    base = base_model(results, variant, repos)
    relation = "merge" if isinstance(base, list) else "finetune"
    data = [*(facts.get("data_repos") or ()), repo_of(repos, "dataset") if "dataset" in repos else None]
    card = ModelCardData(
        language=facts.get("language"),
        license=facts.get("license"),
        license_name=facts.get("license_name"),
        license_link=facts.get("license_link"),
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=relation if base and variant.arm != "original" else None,
        datasets=([d for d in data if d] or None) if variant.arm in TRAINED_ARMS else None,
        tags=_tags(results, variant),
        model_name=repo_of(repos, variant.id).split("/")[-1],
        eval_results=_eval_results(results, variant.id),
    )
    return str(card.to_yaml(original_order=["language", "license", "license_name", "license_link", "library_name"]))


def of_dataset(results: Results, repos: Mapping[str, str], files: Mapping[str, str]) -> str:
    """Front matter of the dataset card; `files` names the file of each configuration; the first is the default."""
    from huggingface_hub import DatasetCardData

    rows = sum(s.trained_rows for s in results.train_sets.values())
    configs: list[dict[str, Any]] = []
    for name, path in files.items():
        configs.append({"config_name": name, "data_files": [{"split": "train", "path": path}]})
    configs[0]["default"] = True
    card = DatasetCardData(
        license=results.facts.get("data_license"),
        annotations_creators="machine-generated",
        size_categories=next((name for limit, name in SIZES if rows < limit), "10M<n<100M"),
        task_categories=["text-generation"],
        source_datasets=results.facts.get("data_repos"),
        pretty_name=repo_of(repos, "dataset").split("/")[-1],
        tags=["hfsd", "self-data-distillation", "synthetic"],
        configs=configs,
    )
    return str(card.to_yaml())


def of_space(results: Results, repos: Mapping[str, str]) -> str:
    """Front matter of the Space's README: the Space's own configuration."""
    from huggingface_hub import SpaceCardData

    base = original_repo(results, repos)
    models = [repo_of(repos, v.variant.id) for v in results.variants if v.variant.id in repos]
    card = SpaceCardData(
        title=f"{results.name}: pruned and recovered"[:SPACE_TITLE].strip(),
        emoji="✂️",
        colorFrom="blue",
        colorTo="green",
        sdk="gradio",
        sdk_version=GRADIO,
        python_version="3.12",  # a string: YAML would read a bare 3.10 as 3.1
        app_file="app.py",
        pinned=False,
        short_description="Original, pruned and recovered model side by side",
        models=list(dict.fromkeys(([base] if base else []) + models)) or None,
        datasets=[repo_of(repos, "dataset")] if "dataset" in repos else None,
        tags=["hfsd", "layer-pruning", "self-data-distillation"],
    )
    return str(card.to_yaml(original_order=["title", "emoji", "colorFrom", "colorTo"]))


def _eval_results(results: Results, variant_id: str) -> list[Any]:
    from huggingface_hub import EvalResult

    entries = []
    for task in results.tasks:
        score = task.scores[variant_id]
        bounds = "" if score.low is None else f", 95% interval {score.low:.4f} to {score.high:.4f}"
        chance = "" if task.chance is None else f", chance {task.chance:.4f}"
        apart = "" if task.setup.comparable else ", local data, not comparable with the leaderboard"
        shown = label(results, task)
        entries.append(
            EvalResult(
                task_type="text-generation",
                # entries of one data set are folded into one; a label of its own keeps each task's name
                dataset_type=shown.replace(" ", "-"),
                dataset_name=shown,
                dataset_args={"num_few_shot": task.shots},
                metric_type=METRICS.get(task.metric, task.metric),
                metric_name=f"{task.metric} ({task.shots} shots, n = {task.n}{bounds}{chance}{apart})",
                metric_value=round(float(score.value), 6),
            )
        )
    return entries


def eval_results(results: Results, variant_id: str) -> str | None:
    """`.eval_results/gsm8k.yaml` of a model's repo, which puts it on the benchmark's leaderboard.

    None but for lm-eval's own GSM8K over its whole test split: of the leaderboard's tasks the only one that the Hub
    knows as a benchmark. The value is in percent, as the Hub's are; other filters' are in its notes.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    chosen, documents = GSM8K
    whole = [
        t
        for t in results.tasks
        if (t.task, t.metric, t.n) == ("gsm8k", "exact_match", documents)
        and t.setup.limit is None
        and t.setup.comparable
    ]
    found = next((t for t in whole if t.filter == chosen), None)
    if found is None:
        return None
    score, shots = found.scores[variant_id], "1 shot" if found.shots == 1 else f"{found.shots} shots"
    notes = [f"lm-eval gsm8k, filter {chosen}, {shots}, n = {found.n}"]
    if score.low is not None and score.high is not None:
        notes.append(f"95% interval {100 * score.low:.2f} to {100 * score.high:.2f}")
    notes.append("chat template" if found.setup.chat_template else "no chat template")
    notes += [f"filter {t.filter}: {100 * t.scores[variant_id].value:.2f}" for t in whole if t is not found]
    entry = EvalResultEntry("openai/gsm8k", "gsm8k", round(100 * float(score.value), 4), notes="; ".join(notes))
    return yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False, allow_unicode=True, width=10_000)


def validate(card_text: str) -> list[str]:
    """What is wrong with a card that the Hub's client would let pass; empty if nothing is."""
    block = _FRONT.match(card_text)
    if not block:
        return ["the card has no YAML front matter"]
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        return [f"the front matter is no YAML: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return ["the front matter is no mapping of names to values"]
    return [*_front_matter_faults(data), *_value_faults(data, ""), *_body_faults(card_text[block.end() :])]


def _front_matter_faults(data: Mapping[str, Any]) -> Iterator[str]:
    for name in _listed(data.get("license")):
        if name not in LICENSES:
            yield f"license: {name!r} is no license identifier of the Hub; use 'other' with license_name"
        if name == "other" and not data.get("license_name"):
            yield "license: 'other' needs a license_name"
    for key in ("base_model", "datasets", "models"):
        for name in _listed(data.get(key)):
            if not (isinstance(name, str) and REPO_ID.fullmatch(name)):
                yield f"{key}: {name!r} is no repo id of the Hub"
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        yield f"base_model_relation: {relation!r} is none of {', '.join(RELATIONS)}"
    if relation is not None and not data.get("base_model"):
        yield "base_model_relation: there is no base_model"


def _value_faults(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _value_faults(item, f"{where}.{key}".lstrip("."))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _value_faults(item, f"{where}[{i}]")
    elif value is None or value in ("None", "nan", "NaN"):
        yield f"{where}: has no value"
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{where}: {value} is no finite number"
    elif isinstance(value, str) and LOCAL_PATH.search(value):
        yield f"{where}: {value!r} holds a local path"


def _body_faults(body: str) -> Iterator[str]:
    for found in LOCAL_PATH.finditer(body):
        yield f"the text holds a local path: {found[0]}"
    prose = _FENCED.sub("", body)
    for found in _NOTHING.finditer(prose):
        around = " ".join(prose[max(0, found.start() - 30) : found.end()].split())
        yield f"the text shows {found[1]} as a value: {around!r}"


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]
