"""What tells two checkpoints apart, of what has to be the same before their numbers can be mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hfsd import models, shards
from hfsd.errors import BadRequest
from hfsd.plain import flat
from hfsd.records import spelled
from hfsd.rundir import sha256

# Differ between two savings of one model, and do not change what it computes. Dtypes are compared tensor by tensor.
NO_MATTER = {"_name_or_path", "transformers_version", "use_cache", "dtype", "torch_dtype"}
SPECIAL = ("bos_token", "eos_token", "unk_token", "add_bos_token", "add_eos_token")


def difference(first: Path, other: Path, trust_remote_code: bool = False) -> str | None:
    """The first thing that differs, with both values: architecture, blocks kept, tensors, config, tokenizer; or None.

    Raises:
        BadRequest: one of them is damaged.
    """
    return (
        _kind(first, other)
        or _cut(first, other)
        or _tensors(first, other)
        or _config(first, other, trust_remote_code)
        or _tokenizer(first, other)
    )


def _kind(first: Path, other: Path) -> str | None:
    kinds = [models.kind_of(models.config_dict(folder)) for folder in (first, other)]
    return None if kinds[0] == kinds[1] else f"the architecture is {kinds[0]} and {kinds[1]}"


def _cut(first: Path, other: Path) -> str | None:
    cuts = [models.provenance(folder) for folder in (first, other)]
    said = ["not said" if c is None else f"{spelled(c.kept)} of {c.n_layers}" for c in cuts]
    if said[0] == said[1]:
        return None
    missing = f" (no {models.PROVENANCE}; copy that of the cut it was tuned from)" if None in cuts else ""
    return f"the blocks kept are {said[0]} and {said[1]}{missing}"


def _tensors(first: Path, other: Path) -> str | None:
    mine, theirs = ({t.name: t for t in shards.read(folder)} for folder in (first, other))
    for name in {**mine, **theirs}:
        if name not in mine or name not in theirs:
            return f"tensor {name} is only in the {'first' if name in mine else 'second'}"
        a, b = mine[name], theirs[name]
        if a.shape != b.shape:
            return f"tensor {name} is {list(a.shape)} and {list(b.shape)}"
        if a.dtype != b.dtype:
            return f"tensor {name} is {a.dtype} and {b.dtype}"
    return None


def tokens_differ(first: Path, other: Path, trust_remote_code: bool = False) -> str | None:
    """How the token ids of another checkpoint differ from the first one's; None: they are the same."""
    if _tokenizer_facts(first) == _tokenizer_facts(other):
        return None
    here, there = (models.load_tokenizer(folder, trust_remote_code).get_vocab() for folder in (first, other))
    for token in sorted(here.keys() | there.keys()):
        if here.get(token) != there.get(token):
            return (
                f"its tokenizer is another one: token {token!r} is {there.get(token, 'none')} there and "
                f"{here.get(token, 'none')} in the original's"
            )
    return None


def _config(first: Path, other: Path, trust_remote_code: bool) -> str | None:
    """As their class completes them: two versions of transformers spell out different defaults."""
    mine, theirs = (flat(models.load_config(folder, trust_remote_code).to_dict()) for folder in (first, other))
    for key in sorted(mine.keys() | theirs.keys()):
        if mine.get(key) != theirs.get(key) and NO_MATTER.isdisjoint(key.split(".")):
            return f"config.json: {key} is {mine.get(key)!r} and {theirs.get(key)!r}"
    return None


def _tokenizer(first: Path, other: Path) -> str | None:
    mine, theirs = _tokenizer_facts(first), _tokenizer_facts(other)
    return next((f"{k} is not the same" for k in {**mine, **theirs} if mine.get(k) != theirs.get(k)), None)


def _tokenizer_facts(folder: Path) -> dict[str, Any]:
    """What a tokenizer makes of text, by the file that says it."""
    facts: dict[str, Any] = {}
    config = _json(folder / "tokenizer_config.json")
    if (folder / "tokenizer.json").is_file():
        # How the last batch was padded and cut off is saved too, and is not the tokenizer's.
        content = _json(folder / "tokenizer.json")
        facts["tokenizer.json"] = {k: v for k, v in content.items() if k not in ("padding", "truncation")}
    else:
        for name in ("tokenizer.model", "vocab.json", "merges.txt"):
            facts[name] = sha256(folder / name) if (folder / name).is_file() else None
    template = folder / "chat_template.jinja"
    is_file = template.is_file()
    facts[template.name] = template.read_text(encoding="utf-8") if is_file else config.get("chat_template")
    for key in SPECIAL:
        value = config.get(key)
        facts[f"{key} of tokenizer_config.json"] = value.get("content") if isinstance(value, dict) else value
    return facts


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is no file."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise BadRequest(f"{path} is no JSON object; fetch the checkpoint again")
    return found
