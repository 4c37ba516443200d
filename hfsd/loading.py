"""A family from the Hub or a folder, by whatever name is at hand: its models on one set of weights, and its records."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hfsd import adapters, familyfile, hub, models
from hfsd.errors import BadRequest, HfsdError, Refusal, nearest
from hfsd.family import Family
from hfsd.familyfile import FamilyFile, Place
from hfsd.rundir import sha256

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# What people copy: a page's address, `datasets/ns/name` as the Hub writes it, a collection's slug, an id.
ADDRESS = re.compile(
    r"(?:https?://[^/]+/)?(?:(?P<kind>datasets|spaces|collections)/)?(?P<name>[^/\s]+(?:/[^/\s?#]+)?)(?:[/?#].*)?"
)
COLLECTION = re.compile(r".+/.+-[0-9a-f]{24}")
KINDS = ("model", "space")  # that hold a family file
TAG = "hfsd"  # on every card


@dataclass(frozen=True)
class Found:
    """A family file, and where it was: `base` is the folder that its paths start from, `revision` that of the asker."""

    file: FamilyFile
    where: str
    base: Path
    revision: str | None = None

    def folder(self, place: Place) -> Path:
        """The files of a place on this machine, downloaded if need be."""
        if place.path is not None:
            return (self.base / place.path).resolve()
        here, _ = hub.snapshot(str(place.repo), place.revision or self.revision, place.subfolder)
        return here / place.subfolder if place.subfolder else here


@dataclass
class Loaded:
    """A family in memory. Memory: the original, plus the adapters, plus one whole checkpoint where one is in use."""

    family: Family
    tokenizer: PreTrainedTokenizerBase
    file: FamilyFile
    where: str

    @property
    def ids(self) -> list[str]:
        """Variants that are ready: original, pruned, then the arms."""
        return self.family.ids

    @property
    def left_out(self) -> list[str]:
        """Variants that were not asked for, and so not downloaded."""
        return [v for v in self.file.arms if v not in self.family.ids]

    def use(self, variant: str) -> AbstractContextManager[PreTrainedModel | PeftModel]:
        """A variant, ready to run, until the block ends. One at a time: the arms share their base's modules.

        Raises:
            BadRequest: there is no such variant, or it was left out.
        """
        if variant in self.left_out:
            size = self.file.params.get(variant, 0)
            how = "a whole checkpoint" if variant in self.file.checkpoints else "an adapter"
            of = f" of {size:,} parameters" if variant in self.file.checkpoints else ""
            raise BadRequest(
                f"{variant} was not loaded: {how}{of}, fetched when it is asked for: "
                f"load_family({self.where!r}, variants=[{variant!r}])"
            )
        return self.family.use(variant)


def load_family(
    name: str | Path,
    variants: Sequence[str] | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Loaded:
    """Original, pruned model and its arms as ready models that share one set of weights.

        family = hfsd.load_family("NAME/MODEL-pruned6")
        with family.use("self-distilled-gsm8k") as model:
            model.generate(...)

    Only the original and the adapters are downloaded, and the original's kept blocks are read once to compare their
    hashes with those of the blocks that the pruned model has. A variant that is no adapter (every weight trained, or
    merged) is a checkpoint of its own: fetched where `variants` names it, and in memory while it is the one in use.

    Args:
        name: any repo of the family (model, data set, Space), their collection, the address of any of them, or a folder
            on this machine: a run, its publish/, or one repo in it.
        variants: the arms to load; None: every adapter. Original and pruned are there in any case.
        revision: branch or commit of the repos whose commit the family file does not name.
        dtype: `auto` is bfloat16 where the device computes it natively, float32 on a CPU.

    Raises:
        BadRequest: there is no such family or variant, or its files are not what they should be.
        Refusal: the original is not the one that the pruned model was cut from, a path leads elsewhere, or a repo
            brings code of its own and `trust_remote_code` is False.
        HfsdError: the Hub cannot be reached.
    """
    found = find(name, revision)
    file = found.file
    wanted = _wanted(file, variants, str(name))
    original = found.folder(file.original)
    models.check_folder(original)
    _check_shared(found, original)
    folders = {arm: _adapter(found, arm) for arm in file.adapters if arm in wanted}
    whole = {arm: _checkpoint(found, arm) for arm in file.checkpoints if arm in wanted}
    tokenizer = models.load_tokenizer(original, trust_remote_code)
    model = models.load(original, dtype, trust_remote_code)
    family = Family(model, file.kept, folders, whole, trust_remote_code)
    return Loaded(family, tokenizer, file, str(name))


def find(name: str | Path, revision: str | None = None) -> Found:
    """The family that a repo, collection, address or folder belongs to.

    Raises:
        BadRequest: it belongs to none, or to several.
        HfsdError: the Hub cannot be reached.
    """
    if Path(name).expanduser().is_dir():
        return _in_folder(Path(name).expanduser())
    asked = ADDRESS.fullmatch(str(name))
    repo, kind = (asked["name"], asked["kind"] or "") if asked else ("", "")
    if kind == "collections" or (not kind and COLLECTION.fullmatch(repo)):
        items = hub.collection_items(repo)
        if items is not None:
            of_space_last = sorted(items, key=lambda item: item[1] == "space")
            return _one_of(_in_repos(of_space_last, revision), f"collection {repo}")
    if not hub.is_repo_id(repo) or str(name).startswith((".", "~", "/")):
        raise BadRequest(f"{name}: no such folder, and no id of a repo or collection such as org/name")
    own = _in_repos([(repo, k) for k in KINDS if kind in ("", f"{k}s")], revision)
    return next(own, None) or _one_of(_made_of(repo, revision), str(name))


def _in_folder(folder: Path) -> Found:
    """Of a run, its publish folder, or one repo of it; where there are several files, the Space's."""
    patterns = (familyfile.NAME, f"*/{familyfile.NAME}", f"publish/*/{familyfile.NAME}")
    files = next((found for p in patterns if (found := sorted(folder.glob(p)))), [])
    of_space_last = sorted(files, key=lambda f: (f.parent / "app.py").is_file())
    return _one_of((Found(familyfile.read(f, local=True), str(folder), f.parent) for f in of_space_last), str(folder))


def _in_repos(repos: Sequence[tuple[str, str]], revision: str | None) -> Iterator[Found]:
    """The family files of those repos that are there and have one.

    Raises:
        HfsdError: none has one, and one of them could not be asked.
    """
    failure: HfsdError | None = None
    for repo, kind in repos:
        try:
            path = hub.file_if_any(repo, kind, familyfile.NAME, revision)
        except HfsdError as error:  # without a network, another kind of that name may be in the cache
            failure = failure or error
            continue
        if path is not None:
            yield Found(familyfile.read(path, local=False), repo, path.parent, revision)
            failure = None
    if failure is not None:
        raise failure


def _made_of(repo: str, revision: str | None) -> Iterator[Found]:
    """The families of the same namespace that a repo is the original or the data set of, by their cards."""
    namespace = repo.rpartition("/")[0]
    made = []
    for model, card in hub.tagged_models(namespace, TAG) if namespace else []:
        named = [card.get("base_model"), card.get("datasets")]
        if any(repo == n or (isinstance(n, list) and repo in n) for n in named):
            made.append((model, "model"))
    return _in_repos(made, revision)


def _one_of(many: Iterable[Found], name: str) -> Found:
    """The one family of several files; of its files, the last.

    Raises:
        BadRequest: there is none, or more than one.
    """
    families = {str(found.file.repos.get("pruned")): found for found in many}
    if len(families) == 1:
        return next(iter(families.values()))
    if families:
        raise BadRequest(f"{name} belongs to several families: give one of {', '.join(sorted(families))}")
    raise BadRequest(
        f"{name}: no {familyfile.NAME} there; check the name, run `hf auth login` if it is private, or see "
        "`hfsd list NAMESPACE`; of this machine, give a finished run or a folder of its publish/"
    )


def _wanted(file: FamilyFile, variants: Sequence[str] | None, name: str) -> Sequence[str]:
    if variants is None:
        return list(file.adapters)
    known = ["original", "pruned", *file.arms]
    if strange := [v for v in variants if v not in known]:
        raise BadRequest(f"{name}: no variant {strange[0]!r}{nearest(strange[0], known)}; there are {', '.join(known)}")
    return variants


def _check_shared(found: Found, original: Path) -> None:
    """Refuses an original whose weights are not those that the pruned model keeps."""
    depth, file = models.depth(original), found.file
    place = file.original.repo or str(original)
    instead = file.repos.get("pruned", "the pruned model")
    if depth != file.n_layers:
        raise Refusal(f"{place} has {depth} blocks; the family was cut from a model of {file.n_layers}")
    if wrong := familyfile.differing(file, original):
        more = f" (and {len(wrong) - 1} more parts: {', '.join(wrong[1:4])})" if len(wrong) > 1 else ""
        raise Refusal(
            f"{wrong[0]} of {place} is not what the pruned model was cut from{more}: the arms cannot share it. "
            f"Fetch it again if its files are damaged, else load {instead} and its arms as stock checkpoints"
        )


def _adapter(found: Found, arm: str) -> Path:
    place = found.file.adapters[arm]
    folder = found.folder(place)
    adapters.check(folder, arm)
    if place.sha256 and sha256(folder / adapters.FILES[1]) != place.sha256:
        raise Refusal(
            f"{arm}: {adapters.FILES[1]} of {place.repo or folder} is not the one that {found.where} names; give "
            f"{found.file.repos.get('space', 'the Space')}, which names commits, or push the family again"
        )
    return folder


def _checkpoint(found: Found, arm: str) -> Path:
    place = found.file.checkpoints[arm]
    if place.path is None:
        size = found.file.params.get(arm, 0)
        print(f"fetching {arm} from {place.repo}: a whole checkpoint of {size:,} parameters", file=sys.stderr)
    folder = found.folder(place)
    models.check_folder(folder)
    return folder
