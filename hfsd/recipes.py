"""Reading recipes: YAML, packaged names, `--set`, and every fault at once, in one line each."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from hfsd.blocks import Block
from hfsd.errors import BadRequest, nearest
from hfsd.recipe import Recipe

PACKAGED = Path(__file__).parent / "packaged"

B = TypeVar("B", bound=Block)


class Loader(yaml.SafeLoader):
    """YAML 1.2's numbers: in 1.1, which PyYAML reads, 12:18 is 738, 1e-4 is a text, and 2026-01-01 is no text."""


OLD_SCALARS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in OLD_SCALARS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?\d+$"), list("-+0123456789"))
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"),  # what is an integer has been taken above
    list("-+.0123456789"),
)


def packaged() -> list[str]:
    """Names of the recipes that travel with the package."""
    return sorted(p.stem for p in PACKAGED.glob("*.yaml"))


def launchers() -> list[str]:
    """Names of the accelerate configs that travel with the package."""
    return sorted(p.stem for p in (PACKAGED / "accelerate").glob("*.yaml"))


def launcher_text(name: str) -> str:
    """A packaged accelerate config."""
    return (PACKAGED / "accelerate" / f"{name}.yaml").read_text(encoding="utf-8")


def source_text(name_or_path: str) -> tuple[str, str]:
    """The recipe's own text and where it was read.

    Raises:
        BadRequest: neither a file nor a packaged name.
    """
    path = Path(name_or_path)
    if name_or_path in packaged() and not path.is_file():
        path = PACKAGED / f"{name_or_path}.yaml"
    try:
        return path.read_text(encoding="utf-8"), str(name_or_path)
    except OSError as error:
        hint = nearest(name_or_path, packaged())
        known = ", ".join(packaged())
        raise BadRequest(
            f"recipe '{name_or_path}': no such file or packaged recipe{hint}; packaged are: {known} "
            f"({error.strerror.lower() if error.strerror else error})"
        ) from None
    except UnicodeDecodeError:
        raise BadRequest(f"recipe '{name_or_path}': not UTF-8 text; give a YAML file or one of {packaged()}") from None


def load(name_or_path: str, sets: list[str] | None = None) -> tuple[Recipe, str]:
    """A recipe with `--set a.b=c` applied, and its source text.

    Raises:
        BadRequest: all faults of the recipe at once, one line each.
    """
    text, where = source_text(name_or_path)
    return parse(text, where, sets), text


def parse(text: str, where: str = "recipe", sets: list[str] | None = None) -> Recipe:
    """The recipe in a YAML text. Raises BadRequest with every fault at once."""
    try:
        data = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise BadRequest(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise BadRequest(f"{where}: a recipe is a mapping of blocks; see `hfsd recipe demo`")
    return validate(data, where, sets)


def validate(data: dict[str, Any], where: str = "recipe", sets: list[str] | None = None) -> Recipe:
    """A recipe from plain data, with `--set` applied. Raises BadRequest with every fault at once."""
    for item in sets or []:
        _set(data, item)
    return checked(Recipe, data, where)


def checked(kind: type[B], data: dict[str, Any], where: str) -> B:
    """One block from plain data. Raises BadRequest with every fault at once, a line each."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        # a list that is too short only because its items are faulty is told by its items
        errors = [e for e in error.errors() if not (e["type"] == "too_short" and e["input"])]
        faults = sorted({_fault(e, kind, data) for e in errors})
        raise BadRequest("\n".join(f"{where}: {f}" for f in faults), rest=_without_faults(kind, data, errors)) from None


def _without_faults(kind: type[B], data: dict[str, Any], errors: Sequence[Any]) -> B | None:
    """What stands without the fields that are faulty (their defaults take their place), if anything does."""
    data = copy.deepcopy(data)
    for fault in errors:
        block: Any = data
        for name in _place(fault["loc"], data):
            inner = _step(block, name)
            if isinstance(inner, dict) or (isinstance(inner, list) and any(isinstance(i, dict) for i in inner)):
                block = inner
                continue
            if isinstance(block, dict):  # a value, or a whole list of values
                block.pop(name, None)
            break
    try:
        return kind.model_validate(data)
    except ValidationError:
        return None


def dump(recipe: Recipe) -> dict[str, Any]:
    """Plain data of a resolved recipe; `validate(dump(r)) == r`. A single data set stands without a list."""
    plain = recipe.model_dump(mode="json", by_alias=True)
    if len(recipe.data) == 1:
        (plain["data"],) = plain["data"]
    return plain


def _set(data: dict[str, Any], item: str) -> None:
    key, sign, value = item.partition("=")
    if not sign or not key.strip("."):
        raise BadRequest(f"--set {item}: write it as a.b=c, such as --set prune.blocks=6")
    *parents, last = key.split(".")
    block: Any = data
    for parent in parents:
        step = block.setdefault(parent, {}) if isinstance(block, dict) else _step(block, parent)
        if isinstance(step, str) and parent in ("model", "data"):
            step = block[parent] = {"path" if parent == "model" else "source": step}
        if not isinstance(step, dict | list):
            raise BadRequest(f"--set {item}: '{parent}' is {step!r}, which has no fields")
        block = step
    if not isinstance(block, dict):
        numbered = ".".join([*parents, "0", last])
        raise BadRequest(f"--set {item}: '{parents[-1]}' is a list of {len(block)}; name one by its number: {numbered}")
    try:
        block[last] = yaml.load(value, Loader)
    except yaml.YAMLError:
        raise BadRequest(f"--set {item}: {value!r} is not a YAML value; quote it") from None


def _step(block: Any, name: Any) -> Any:
    """One step into plain data: a key of a mapping, or a place in a list; None where there is no such thing."""
    if isinstance(block, dict):
        return block.get(name)
    if isinstance(block, list) and str(name).isdecimal() and int(name) < len(block):
        return block[int(name)]
    return None


def _place(location: Sequence[Any], data: Any) -> list[Any]:
    """Where a fault is as the recipe was written: a single data set or model may stand without its list or mapping."""
    place: list[Any] = []
    for name in location:
        if isinstance(name, int) and not isinstance(data, list | tuple):
            continue
        place.append(name)
        data = data[name] if isinstance(data, list | tuple) else _step(data, name)
    return place


def _fault(error: Any, kind: type[Block], data: Any) -> str:
    """One fault in one line: the field's dotted path, what was received, what would be right."""
    path = ".".join(map(str, _place(error["loc"], data))) or "recipe"
    if error["type"] == "extra_forbidden":
        *parents, last = error["loc"]
        block = _block_at(kind, [name for name in parents if isinstance(name, str)])
        return f"{path}: unknown key{nearest(str(last), block)}; known are: {', '.join(block)}"
    if error["type"] == "missing":
        return f"{path}: missing"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{path}: {message}" if error["loc"] else message
    return f"{path}: {message[:1].lower() + message[1:]}; got {error['input']!r}"


def _block_at(kind: type[Block], location: list[str]) -> list[str]:
    """Names of the fields of the block at a dotted place, as a recipe spells them."""
    block: Any = kind
    for name in location:
        field = next(f for n, f in block.model_fields.items() if (f.alias or n) == name)
        kinds = (field.annotation, *getattr(field.annotation, "__args__", ()))
        block = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return [f.alias or n for n, f in block.model_fields.items()]
