"""The only module that talks to the Hub. Tokens come from the environment or the `hf` login, never from a recipe."""

from __future__ import annotations

import gc
import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from hfsd.errors import BadRequest, HfsdError

COMMIT = re.compile(r"[0-9a-f]{40}")
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

    with _spoken(f"model {repo}{f'@{revision}' if revision else ''}"):
        wanted = [f"{subfolder}/*"] if subfolder else [w for w in WANTED if weights or w != "*.safetensors"]
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    return folder, folder.name  # the cache names a snapshot's folder by its commit


def file(repo: str, name: str, revision: str | None) -> Path:
    """One file of a model repo in the local cache."""
    from huggingface_hub import hf_hub_download

    with _spoken(f"model {repo}{f'@{revision}' if revision else ''}"):
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
    with _spoken(what):
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
        with _spoken(f"dataset {source}{f'@{revision}' if revision else ''}"):
            return HfApi().dataset_info(source, revision=revision).sha
    except HfsdError:
        return None


def whoami() -> str:
    """The name behind the token at hand.

    Raises:
        BadRequest: there is no token, or the Hub does not know it.
    """
    from huggingface_hub import HfApi, get_token

    if not get_token():
        raise BadRequest("publish needs a token: run `hf auth login` or set HF_TOKEN; nothing was sent")
    with _spoken("the token at hand"):
        return HfApi().whoami()["name"]


def upload(folder: Path, repo: str, kind: str, private: bool, message: str) -> tuple[str, str]:
    """Sends a folder to a repo (`model`, `dataset` or `space`) in one commit, creating the repo if need be.

    Returns:
        The commit that holds exactly these files (the current one where nothing changed), and the repo's URL.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _spoken(f"{kind} repo {repo}"):
        sdk = "gradio" if kind == "space" else None
        url = api.create_repo(repo, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk)
        commit = api.upload_folder(
            repo_id=repo, repo_type=kind, folder_path=folder, commit_message=message, delete_patterns=["*"]
        )
    return commit.oid, str(url)


def files(repo: str, kind: str, revision: str) -> dict[str, tuple[int, str | None]]:
    """Size in bytes and LFS sha256 (None for a small file) of every file of a repo at a revision."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _spoken(f"{kind} repo {repo}"):
        tree = HfApi().list_repo_tree(repo, recursive=True, revision=revision, repo_type=kind)
        return {e.path: (e.size, e.lfs.sha256 if e.lfs else None) for e in tree if isinstance(e, RepoFile)}


@contextmanager
def _spoken(what: str) -> Iterator[None]:
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
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no answer"
        raise HfsdError(f"{what}: the Hub answered {status}: {(error.server_message or '').strip()[:200]}") from error
    except (errors.HTTPError, ConnectionError) as error:
        hint = "; set HF_HUB_DISABLE_XET=1 where the Hub has no Xet" if "xet" in str(error) else ""
        raise HfsdError(f"{what}: the Hub cannot be reached ({type(error).__name__}){hint}") from error
