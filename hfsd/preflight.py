"""What can be wrong with a push, looked at before the first byte is sent. Each function returns faults, a line each."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfsd import data, disk, hub
from hfsd.errors import BadRequest, HfsdError
from hfsd.metadata import LICENSES, REPO_ID
from hfsd.recipe import Recipe
from hfsd.rundir import DONE, Stage, read_json
from hfsd.short_cards import base_of
from hfsd.staging import Family, adapter_folder, weights_folder
from hfsd.text import size

WRITERS = ("admin", "write", "contributor")  # roles in an organization that may write
SECRETS = {
    "a Hugging Face token": re.compile(rb"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{30,}"),
    "a secret key (sk-...)": re.compile(rb"(?<![A-Za-z0-9_-])sk-(?=[A-Za-z_-]{0,40}\d)[A-Za-z0-9_-]{20,}"),
    "an AWS access key": re.compile(rb"(?<![A-Za-z0-9])(?:AKIA|ASIA)[0-9A-Z]{16}(?![A-Za-z0-9])"),
    "a private key": re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----"),
}
CHUNK, OVERLAP = 1 << 24, 256  # bytes of a text file that are looked at together, and again with what follows
SHORTEST = 8  # characters of a token that is looked for
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")


@dataclass(frozen=True)
class License:
    """What is known of the license of an original or of a data set: `facts` for the card, or the fault."""

    facts: dict[str, Any]
    fault: str | None = None


def token(namespace: str, proposes: bool, collects: bool) -> tuple[str | None, list[str]]:
    """The account behind the token at hand, and what keeps it from writing to a namespace.

    Args:
        proposes: only pull requests are opened, which any account may do.
        collects: a collection is made, too.
    """
    try:
        told = hub.profile()
    except BadRequest as error:
        return None, [str(error)]
    access = told.get("auth", {}).get("accessToken", {})
    role, name, faults = access.get("role"), told["name"], []
    if role == "read":
        faults.append("the token at hand may only read; make one that may write on your page of access tokens")
    if proposes:
        return name, faults
    places = {org["name"]: org.get("roleInOrg", "write") for org in told.get("orgs", [])}
    if namespace != name and namespace not in places:
        where = ", ".join([name, *sorted(org for org, place in places.items() if place in WRITERS)])
        faults.append(f"--to {namespace}: {name} is no member of it; the token at hand may write to {where}")
    elif namespace != name and places[namespace] not in WRITERS:
        faults.append(f"--to {namespace}: {name} has the role '{places[namespace]}' there, which may not write")
    if role == "fineGrained" and not faults:
        faults += _scopes(access.get("fineGrained") or {}, namespace, collects)
    return name, faults


def _scopes(granted: Mapping[str, Any], namespace: str, collects: bool) -> Iterator[str]:
    scopes = [s for s in granted.get("scoped", []) if s.get("entity", {}).get("name") == namespace]
    held = {p for s in scopes for p in s.get("permissions", [])} | set(granted.get("global", []))
    for permission in ("repo.write", *(["collection.write"] if collects else [])):
        if permission not in held:
            yield f"--to {namespace}: the fine-grained token at hand lacks the permission {permission} there"


def names(ids: Sequence[str]) -> list[str]:
    """Repo ids that the Hub would refuse, or that are given to two repos."""
    bad = [i for i in ids if not (REPO_ID.fullmatch(i) and hub.is_repo_id(i))]
    faults = [
        f"{i} is no name that the Hub takes (letters, digits, - _ . and at most 96 characters, no -- or ..); "
        "change publish.prefix or publish.names"
        for i in bad
    ]
    twice = sorted({i for i in ids if ids.count(i) > 1})
    return faults + [f"two repos would be called {i}; change publish.prefix or publish.names" for i in twice]


def licensed(family: Family, given: str | None) -> tuple[Family, list[str]]:
    """The family with the licenses of original and data among its facts, and those that are missing or forbid it.

    Args:
        given: an identifier of the Hub, for what states none.
    """
    if given is not None and given not in LICENSES:
        return family, [f"--license {given}: no license identifier of the Hub, such as apache-2.0 or cc-by-4.0"]
    recipe, facts, ref = family.recipe, family.results.facts, family.results.original
    place = (ref.repo, "model", ref.revision) if base_of(ref) else None
    found = license_of(f"the original {ref.repo}", facts.get("license") or recipe.model.license, place, given)
    sets = _of_data(recipe, given)
    of_data = {s.facts.get("license") for s in sets}
    new = {**facts, **{k: v for k, v in found.facts.items() if not facts.get(k)}}
    if len(of_data) == 1:
        new["data_license"] = facts.get("data_license") or of_data.pop()
    new = {k: v for k, v in new.items() if v is not None}
    faults = [one.fault for one in (found, *sets) if one.fault]
    return replace(family, results=replace(family.results, facts=new)), list(dict.fromkeys(faults))


def unlicensed(recipe: Recipe) -> list[str]:
    """The same faults before anything is run, for a recipe that publishes at its end."""
    path, at = recipe.model.path, Path(recipe.model.path).expanduser()
    on_hub = not at.is_dir() and at.suffix != ".gguf" and hub.is_repo_id(path)
    place = (path, "model", recipe.model.revision) if on_hub else None
    found = [license_of(f"the original {path}", recipe.model.license, place, None), *_of_data(recipe, None)]
    return [one.fault for one in found if one.fault]


def _of_data(recipe: Recipe, given: str | None) -> list[License]:
    found = []
    for d in recipe.data:
        place = (d.source, "dataset", d.revision) if data.is_hub(d.source) else None
        found.append(license_of(f"the data set {d.source}", d.license, place, given))
    return found


def license_of(what: str, stated: str | None, place: tuple[str, str, str | None] | None, given: str | None) -> License:
    """A license as the recipe states it, else as its repo's card does, else as `--license` gives it.

    Args:
        place: repo, kind and revision, where it is on the Hub.
    """
    facts: dict[str, Any] = {"license": stated} if stated else {}
    gated = False
    if not facts and place is not None:
        try:
            facts, gated = hub.card_facts(*place)
        except HfsdError as error:
            return License({}, None) if given else License({}, f"the license of {what} is not known: {error}")
    if isinstance(facts.get("license"), list) or facts.get("license") == "unknown":
        facts = {}
    if given and (gated or not facts):
        facts = {"license": given}
    if not facts:
        return License(
            {}, f"the license of {what} is not known: find it out, and state it with --license ID or in the recipe"
        )
    if gated and not given:
        said = facts["license"]
        return License(
            facts, f"{what} is gated: read its terms ({said}), and state its license with --license ID or in the recipe"
        )
    if re.search(r"-nd(-|$)", str(facts["license"])):
        return License(facts, f"{what} is under {facts['license']}, which allows no derivatives to be shared")
    return License(facts)


def space(family: Family, out: Path) -> list[str]:
    """Whether what cannot be hard-linked into the staged folders fits beside them."""
    folders = [weights_folder(family, r.key) for r in family.repos if r.kind == "model" and "/" not in r.key]
    folders += [adapter_folder(family.root, r.key.removesuffix("/adapter")) for r in family.repos]
    return room(folders, out)


def room(folders: Sequence[Path], out: Path) -> list[str]:
    """Whether the files of these folders, where they lie on another disk, fit beside the staged ones."""
    place = disk.standing(out)
    device = place.stat().st_dev
    files = [p.resolve() for folder in folders if folder.is_dir() for p in folder.iterdir() if p.is_file()]
    needed, free = sum(p.stat().st_size for p in files if p.stat().st_dev != device), disk.free(place)
    if needed <= free:
        return []
    return [f"the folders of the repos need {size(needed)} in {place}, which has {size(free)} free; free some space"]


def markers(root: Path, steps: Sequence[str]) -> list[str]:
    """Steps of a run that are not finished, or whose outputs are not what their markers say, hashed again."""
    faults = []
    for name in steps:
        path = root / name
        if not (path / DONE).is_file():
            faults.append(f"{name} is not finished in {root}; finish it with `hfsd run`")
            continue
        marker = read_json(path / DONE)
        try:
            Stage(name, path, marker["fields"], marker["inputs"]).is_done(verify=True)
        except HfsdError as error:
            faults.append(str(error))
    return faults


def secrets(folder: Path, files: Sequence[str], name: str) -> list[str]:
    """Text files and rows of a staged folder that hold what looks like a secret, or the token; it is not shown."""
    own = hub.token()
    patterns = dict(SECRETS)
    if own and len(own) >= SHORTEST:
        patterns["the token at hand"] = re.compile(re.escape(own.encode()))
    faults = []
    for path in files:
        for what in _found(folder / path, patterns):
            faults.append(f"{name}: {path} holds what looks like {what}; take it out where it came from, and run again")
    return faults


def _found(path: Path, patterns: Mapping[str, re.Pattern[bytes]]) -> list[str]:
    found: dict[str, None] = {}
    for text in _rows(path) if path.suffix == ".parquet" else _text(path):
        found |= {what: None for what, pattern in patterns.items() if pattern.search(text)}
    return list(found)


def _text(path: Path) -> Iterator[bytes]:
    """A text file in parts that overlap; nothing of a binary one."""
    with open(path, "rb") as handle:
        text = handle.read(CHUNK)
        if b"\0" in text[:8192]:  # binary, as git tells it
            return
        while text:
            yield text
            more = handle.read(CHUNK)
            text = text[-OVERLAP:] + more if more else b""


def _rows(path: Path) -> Iterator[bytes]:
    """What people wrote into a data set, which is compressed in its file."""
    from pyarrow import parquet

    for batch in parquet.ParquetFile(path).iter_batches(batch_size=1000):
        yield json.dumps(batch.to_pylist(), default=str, ensure_ascii=False).encode(errors="replace")


def pickles(folder: Path) -> list[str]:
    """Files that can run code when they are read: they are not sent."""
    found = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)  # a folder that is gone is a marker's fault
    return [f"{folder}: {found[0]} is a pickle, which can run code when it is read; remove it"] if found else []
