"""The only module that talks to the Hub. Tokens come from the environment or the `hf` login, never from a recipe."""

from __future__ import annotations

import gc
import re
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from hfsd.errors import BadRequest, HfsdError

T = TypeVar("T")
COMMIT = re.compile(r"[0-9a-f]{40}")
WAITS = (1, 2, 4, 8, 16)  # seconds before each further try of what the client tries once
LONGEST_WAIT = 120  # seconds that a Retry-After may ask for
PASSING = (408, 429, 500, 502, 503, 504)
# What a checkpoint needs: no pickles, no other frameworks' copies of the weights.
WANTED = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py", "README.md"]


def is_repo_id(text: str) -> bool:
    """Whether a text has the form of a Hub id (`name` or `org/name`)."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def snapshot(repo: str, revision: str | None, subfolder: str | None = None, weights: bool = True) -> tuple[Path, str]:
    """A model's files in the local cache, and the commit they are of.

    Args:
        subfolder: fetch this folder of the repo only (an adapter beside merged weights).
        weights: False: fetch what describes the model, config and tokenizer, and no weights.

    Raises:
        BadRequest: no such repo or revision, or a gated one.
        HfsdError: the Hub cannot be reached and the cache does not hold it.
    """
    from huggingface_hub import snapshot_download

    with spoken(f"model {repo}{f'@{revision}' if revision else ''}"):
        wanted = [f"{subfolder}/*"] if subfolder else [w for w in WANTED if weights or w != "*.safetensors"]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    return folder, folder.name  # the cache names a snapshot's folder by its commit


def file(repo: str, name: str, revision: str | None) -> Path:
    """One file of a model repo in the local cache."""
    from huggingface_hub import hf_hub_download

    with spoken(f"model {repo}{f'@{revision}' if revision else ''}"):
        return Path(hf_hub_download(repo, name, revision=revision))


def dataset_rows(
    source: str, config: str | None, split: str, revision: str | None, first: int | None = None
) -> list[dict[str, Any]]:
    """The rows of one split of a Hub dataset: all of them, or only the `first` ones, streamed.

    Raises:
        BadRequest: no such dataset, configuration, split or revision, or files that `datasets` cannot read.
        HfsdError: the Hub cannot be reached, and the cache does not hold the rows or does not tell their revision.
    """
    import datasets
    from datasets.exceptions import DatasetGenerationError, DatasetsError
    from datasets.packaged_modules.cache.cache import Cache

    asked = {"config": config, "split": split, "revision": revision}
    what = f"dataset {source} ({', '.join(f'{k} {v}' for k, v in asked.items() if v)})"
    with spoken(what):
        try:
            builder = datasets.load_dataset_builder(source, config, revision=revision)
            if revision and isinstance(builder, Cache):
                # It takes the rows that were cached last, of whatever revision.
                raise HfsdError(f"{what}: the Hub cannot be reached, and the cache does not tell revisions apart")
            if first is not None:
                return _first_of(builder.as_streaming_dataset(split), first)
            builder.download_and_prepare()
            return list(builder.as_dataset(split))
        except (DatasetsError, ValueError, FileNotFoundError, RuntimeError) as error:
            why = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
            told = " ".join(str(why).split()).partition(" Example of usage")[0][:300].rstrip(".")
            raise BadRequest(
                f"{what}: {told}; check data.source, data.config, data.split and data.revision, "
                "or run `hf auth login` if it is private"
            ) from error


def _first_of(stream: Any, count: int) -> list[dict[str, Any]]:
    """The first rows of a streamed dataset, and nothing of it left behind.

    Not take(count): that fetches the next row group or file before it stops. What pyarrow reads ahead has to end here:
    if it meets the interpreter's own end, the process is aborted (apache/arrow#45214).
    """
    rows = iter(stream)
    found = list(islice(rows, count))
    if isinstance(rows, Generator):
        rows.close()
    del rows, stream
    gc.collect()
    return found


def dataset_commit(source: str, revision: str | None) -> str | None:
    """The commit of a dataset's revision; None where the Hub does not tell: rows may be in the cache, or never read."""
    from huggingface_hub import HfApi

    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    try:
        with spoken(f"dataset {source}{f'@{revision}' if revision else ''}"):
            return HfApi().dataset_info(source, revision=revision).sha
    except HfsdError:
        return None


def token() -> str | None:
    """The token at hand, from the environment or the `hf` login; it is to be shown nowhere."""
    from huggingface_hub import get_token

    return get_token()


def profile() -> dict[str, Any]:
    """What the Hub tells of the token at hand: its account, organizations, role and permissions.

    Raises:
        BadRequest: there is no token, or the Hub does not know it.
    """
    from huggingface_hub import HfApi, errors

    if not token():
        raise BadRequest("publish needs a token: run `hf auth login` or set HF_TOKEN; nothing was sent")
    with spoken("the token at hand"):
        try:
            return patiently("whoami", HfApi().whoami)
        except errors.HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 401:
                raise
            raise BadRequest("the Hub does not know the token at hand; run `hf auth login`, or set HF_TOKEN") from None


class Held(NamedTuple):
    """A file as a repo holds it: bytes, its LFS sha256 (None for a small file), and its git id."""

    size: int
    sha256: str | None
    blob: str


def files(repo: str, kind: str, revision: str) -> dict[str, Held]:
    """Every file of a repo (`model`, `dataset` or `space`) at a revision."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    def listed() -> dict[str, Held]:
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=revision, repo_type=kind)
        return {
            e.path: Held(e.size, e.lfs.sha256 if e.lfs else None, e.blob_id) for e in tree if isinstance(e, RepoFile)
        }

    with spoken(f"{kind} repo {repo}"):
        return patiently(f"{kind} repo {repo}", listed)


def card_facts(repo: str, kind: str, revision: str | None) -> tuple[dict[str, Any], bool]:
    """License, as the card of a repo states it (`license`, `license_name`, `license_link`), and whether it is gated."""
    from huggingface_hub import HfApi

    with spoken(f"{kind} repo {repo}"):
        info = patiently(f"{kind} repo {repo}", lambda: HfApi().repo_info(repo, repo_type=kind, revision=revision))
    said = getattr(info, "card_data", None)
    card = said.to_dict() if said else {}
    named = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
    return named, bool(getattr(info, "gated", False))


def download(repo: str, kind: str, commit: str, cache: Path) -> Path:
    """Every file of a repo at a commit, fetched into a cache folder of its own."""
    from huggingface_hub import snapshot_download

    with spoken(f"{kind} repo {repo}"):
        return Path(snapshot_download(repo, repo_type=kind, revision=commit, cache_dir=cache))


def patiently(what: str, call: Callable[[], T]) -> T:
    """Calls the Hub again where it is busy, down or cut off, a bounded number of times, a line for each.

    For what the client tries once; it retries uploads, lists and downloads itself.
    """
    from huggingface_hub import errors

    for wait in WAITS:
        try:
            return call()
        except errors.HTTPError as error:
            pause = _pause(error, wait)
            if pause is None:
                raise
            print(f"{what}: {_why(error)}; trying again in {pause} s", file=sys.stderr, flush=True)
            time.sleep(pause)
    return call()


def _pause(error: Exception, wait: int) -> int | None:
    """Seconds to wait before another try; None: another try would not help, or not soon."""
    response = getattr(error, "response", None)
    if response is None:  # the connection broke, or the client has refused to speak
        return None if isinstance(error, OSError) else wait
    if response.status_code not in PASSING:
        return None
    asked = response.headers.get("retry-after", "")
    longer = max(wait, int(asked)) if asked.isdecimal() else wait
    return longer if longer <= LONGEST_WAIT else None


def _why(error: Exception) -> str:
    response = getattr(error, "response", None)
    return f"the Hub answered {response.status_code}" if response is not None else f"cut off ({type(error).__name__})"


@contextmanager
def spoken(what: str) -> Iterator[None]:
    """Turns the client's exceptions into one line each, without the request's headers."""
    from huggingface_hub import errors

    endpoint_hint = "check the name, or run `hf auth login` if it is private"
    try:
        yield
    except errors.GatedRepoError as error:
        raise BadRequest(f"{what} is gated: accept its terms on its page, then run `hf auth login`") from error
    except errors.LocalEntryNotFoundError as error:
        raise HfsdError(
            f"{what}: the Hub cannot be reached and the cache does not hold it; give a local folder"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise BadRequest(f"{what}: the Hub has no such thing; {endpoint_hint}") from error
    except (errors.HTTPError, ConnectionError) as error:
        raise HfsdError(f"{what}: {_failure(error)}") from error
    except RuntimeError as error:
        if not isinstance(error.__cause__, errors.HTTPError):  # how the client tells that an LFS upload has failed
            raise
        raise HfsdError(f"{what}: {_failure(error.__cause__)}; push again to go on") from error


def _failure(error: Exception) -> str:
    response = getattr(error, "response", None)
    if response is not None:
        said = (getattr(error, "server_message", None) or "").strip()[:200]
        return f"the Hub answered {response.status_code}: {said}"
    hint = "; set HF_HUB_DISABLE_XET=1 where the Hub has no Xet" if "xet" in str(error) else ""
    return f"the Hub cannot be reached ({type(error).__name__}){hint}"


def file_if_any(repo: str, kind: str, name: str, revision: str | None) -> Path | None:
    """One file of a repo (`model`, `dataset` or `space`) in the local cache; None: no such repo, revision or file.

    The folder that holds it is named by its commit.

    Raises:
        BadRequest: the repo is gated.
        HfsdError: the Hub cannot be reached, and the cache does not hold it.
    """
    from huggingface_hub import errors, hf_hub_download

    with spoken(f"{kind} {repo}{f'@{revision}' if revision else ''}"):
        try:
            return Path(hf_hub_download(repo, name, repo_type=kind, revision=revision))
        except (errors.GatedRepoError, errors.LocalEntryNotFoundError):
            raise
        except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
            return None


def collection_items(slug: str) -> list[tuple[str, str]] | None:
    """(repo, kind) of what a collection holds, in its order, papers and the like left out; None: no such collection."""
    from huggingface_hub import HfApi, errors

    with spoken(f"collection {slug}"):
        try:
            items = patiently(f"collection {slug}", lambda: HfApi().get_collection(slug)).items
        except errors.HfHubHTTPError as error:
            if error.response is not None and error.response.status_code == 404:
                return None
            raise
    return [(i.item_id, i.item_type) for i in items if i.item_type in ("model", "dataset", "space")]


def tagged_models(namespace: str, tag: str) -> list[tuple[str, dict[str, Any]]]:
    """(repo, its card's front matter) of every model of a namespace that carries a tag, by name."""
    from huggingface_hub import HfApi

    with spoken(f"the models of {namespace}"):
        found = HfApi().list_models(author=namespace, filter=tag, cardData=True)
        return [(m.id, m.card_data.to_dict() if m.card_data else {}) for m in sorted(found, key=lambda m: m.id)]
