"""Front matter of cards: parsing, and the checks behind `POST /api/validate-yaml`.

The wording follows the Hub's where it is known. The Hub checks more fields than these; what is here is what a
publisher of models, datasets and Spaces gets wrong. Stricter than the Hub in one point: a NaN or infinite number
anywhere is an error, since the Hub turns it into null without a word.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

# the Hub lists them in its refusal of an unknown one; as of July 2026
_LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openmdw-1.1 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
"""
LICENSES = tuple(_LICENSES.split())
RELATIONS = ("adapter", "merge", "quantized", "finetune")
COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
SDKS = ("gradio", "docker", "static", "streamlit")
_FRONT_MATTER = re.compile(r"^\ufeff?\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)
_REPO_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?", re.ASCII)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z]{2,4})?|code|multilingual")


class _Loader(yaml.SafeLoader):
    """Safe, and as strict about repeated keys as the Hub's own parser."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
    if repeated := sorted({key for key in keys if keys.count(key) > 1}):
        raise yaml.constructor.ConstructorError(None, None, f"duplicated mapping key {repeated}", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def front_matter(text: str) -> dict[str, Any] | None:
    """The metadata block of a README, or None if it has none. Raises yaml.YAMLError when it is broken."""
    block = _FRONT_MATTER.match(text)
    data = yaml.load(block[1], _Loader) if block else None
    if data is not None and not isinstance(data, dict):
        raise yaml.YAMLError("metadata must be a mapping of names to values")
    return data


def check_card(text: str, repo_type: str) -> tuple[list[str], list[str]]:
    """Errors and warnings of a whole README, as the Hub reports them."""
    try:
        data = front_matter(text)
    except yaml.YAMLError as error:
        return [f"YAML parsing error: {error}"], []
    if not data:
        errors = [f'"{key}" is required' for key in ("sdk", "colorFrom", "colorTo") if repo_type == "space"]
        return errors, ["empty or missing yaml metadata in repo card"]
    checks = _space(data) if repo_type == "space" else _model_or_dataset(data, repo_type)
    return [*_not_finite(data, ""), *checks], []


def _model_or_dataset(data: dict[str, Any], repo_type: str) -> Iterator[str]:
    for name, value in _each(data, "license"):
        yield from _one_of(name, value, LICENSES)
    for name, value in _each(data, "language"):
        # YAML reads a bare `no` (Norwegian) as false: the usual way to get a language wrong
        if not (isinstance(value, str) and _LANGUAGE.fullmatch(value)):
            yield f'"{name}" with value "{value}" is not valid. It must be an ISO 639-1, 639-2 or 639-3 code'
    for key in ("tags", "metrics", "task_categories"):
        for name, value in _each(data, key):
            yield from _text(name, value)
    for key in ("library_name", "pipeline_tag", "license_name", "license_link", "pretty_name"):
        if key in data:
            yield from _text(key, data[key])
    for name, value in _each(data, "base_model"):
        yield from _repo_id(name, value, "Use a model id from https://hf.co/models.")
    for name, value in _each(data, "datasets"):
        yield from _repo_id(name, value, "If possible, use a dataset id from https://hf.co/datasets.")
    if "base_model_relation" in data:
        yield from _one_of("base_model_relation", data["base_model_relation"], RELATIONS)
    if repo_type == "model" and "model-index" in data:
        yield from _model_index(data["model-index"])
    if repo_type == "dataset" and "configs" in data:
        yield from _required("configs", data["configs"], ("config_name",))


def _space(data: dict[str, Any]) -> Iterator[str]:
    for key, allowed in (("sdk", SDKS), ("colorFrom", COLORS), ("colorTo", COLORS)):
        if key in data:
            yield from _one_of(key, data[key], allowed)
        elif key == "sdk":
            yield '"sdk" is required'
    for key in ("title", "emoji", "app_file", "sdk_version", "python_version", "short_description"):
        # an unquoted 3.10 is the number 3.1
        if key in data:
            yield from _text(key, data[key])
    if len(str(data.get("short_description", ""))) > 60:
        yield '"short_description" length must be less than or equal to 60 characters long'
    for name, value in _each(data, "license"):
        yield from _one_of(name, value, LICENSES)
    for key, hint in (("models", "Use a model id."), ("datasets", "Use a dataset id.")):
        for name, value in _each(data, key):
            yield from _repo_id(name, value, hint)


def _model_index(index: Any) -> Iterator[str]:
    yield from (errors := list(_required("model-index", index, ("name", "results"))))
    for i, model in enumerate([] if errors else index):
        where = f"model-index[{i}].results"
        yield from (errors := list(_required(where, model["results"], ("task", "metrics"))))
        for j, result in enumerate([] if errors else model["results"]):
            yield from _required(f"{where}[{j}].task", [result["task"]], ("type",))
            if "dataset" in result:
                yield from _required(f"{where}[{j}].dataset", [result["dataset"]], ("name", "type"))
            yield from _required(f"{where}[{j}].metrics", result["metrics"], ("type", "value"))


def _required(name: str, items: Any, keys: tuple[str, ...]) -> Iterator[str]:
    if not isinstance(items, list):
        yield f'"{name}" must be an array'
        return
    for i, item in enumerate(items):
        if not isinstance(item, dict):
            yield f'"{name}[{i}]" must be of type object'
            continue
        yield from (f'"{name}[{i}].{key}" is required' for key in keys if item.get(key) is None)


def _each(data: dict[str, Any], key: str) -> Iterator[tuple[str, Any]]:
    """A field that may hold one value or a list: (name of the place, value)."""
    if key in data:
        value = data[key]
        yield from (
            ((f"{key}[{i}]", item) for i, item in enumerate(value)) if isinstance(value, list) else [(key, value)]
        )


def _text(name: str, value: Any) -> Iterator[str]:
    if not isinstance(value, str):
        yield f'"{name}" must be a string'
    elif not value.strip():
        yield f'"{name}" is not allowed to be empty'


def _one_of(name: str, value: Any, allowed: Any) -> Iterator[str]:
    if errors := list(_text(name, value)):
        yield from errors
    elif value not in allowed:
        yield f'"{name}" must be one of [{", ".join(allowed)}]'


def _repo_id(name: str, value: Any, hint: str) -> Iterator[str]:
    if errors := list(_text(name, value)):
        yield from errors
    elif not _REPO_ID.fullmatch(value):
        yield f'"{name}" with value "{value}" is not valid. {hint}'


def _not_finite(value: Any, where: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield f'"{where}" must be a finite number'
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _not_finite(item, f"{where}.{key}" if where else str(key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _not_finite(item, f"{where}[{i}]")
