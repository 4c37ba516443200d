"""The writing half of `hub`: the state of a repo, one commit for all that differs in it, branches, collections.

Calls that the client tries once are tried again; a commit whose answer was lost is looked for before it is sent again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfsd import hub
from hfsd.errors import HfsdError, Refusal
from hfsd.hub import Held, patiently, spoken

OWN = frozenset({".gitattributes"})  # the Hub's own, which no push removes
FIRST = OWN | {"README.md"}  # what the Hub may put into a repo that it makes


@dataclass(frozen=True)
class Head:
    """A repo as it is: its newest commit on `revision`, what that holds, and who sees it."""

    commit: str
    revision: str
    files: dict[str, Held]
    private: bool


@dataclass(frozen=True)
class Last:
    """The newest of the `count` commits of a branch."""

    commit: str
    author: str
    title: str
    date: str
    count: int


@dataclass(frozen=True)
class Made:
    """A commit, the revision that it is on (a branch, or `refs/pr/N`), and the page that shows it."""

    commit: str
    revision: str
    url: str


def state(repo: str, kind: str, revision: str) -> Head | None:
    """A repo at a branch, or at main where it has no such branch yet; None: no such repo, or none for this token."""
    from huggingface_hub import HfApi, errors

    what = f"{kind} repo {repo}"

    def info(revision: str) -> Any:
        return patiently(what, lambda: HfApi().repo_info(repo, repo_type=kind, revision=revision))

    with spoken(what):
        try:
            found = info(revision)
        except errors.RevisionNotFoundError:
            revision, found = "main", info("main")
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            return None
    held = hub.files(repo, kind, found.sha)
    return Head(found.sha, revision, held, bool(found.private))


def last_commit(repo: str, kind: str, revision: str) -> Last:
    """Whose commit is the newest."""
    from huggingface_hub import HfApi

    what = f"{kind} repo {repo}"
    with spoken(what):
        all_ = patiently(what, lambda: HfApi().list_repo_commits(repo, repo_type=kind, revision=revision))
    newest = all_[0]
    authors = ", ".join(newest.authors) or "unknown"
    return Last(newest.commit_id, authors, newest.title, f"{newest.created_at:%Y-%m-%d %H:%M}", len(all_))


def create(repo: str, kind: str, private: bool) -> Head:
    """A new repo, or the one of that name; a Space is a Gradio one."""
    from huggingface_hub import HfApi

    what, sdk = f"{kind} repo {repo}", "gradio" if kind == "space" else None
    with spoken(what):
        patiently(
            what,
            lambda: HfApi().create_repo(repo, repo_type=kind, private=private, exist_ok=True, space_sdk=sdk),
        )
    made = state(repo, kind, "main")
    if made is None:
        raise HfsdError(f"{what} was created, and the Hub does not show it; push again in a moment")
    return made


def branch(repo: str, kind: str, name: str, commit: str) -> None:
    """A branch that starts at a commit, if it is not there."""
    from huggingface_hub import HfApi

    what = f"{kind} repo {repo}"
    with spoken(what):
        patiently(
            what, lambda: HfApi().create_branch(repo, repo_type=kind, branch=name, revision=commit, exist_ok=True)
        )


def differing(folder: Path, files: Mapping[str, str], there: Mapping[str, Held]) -> tuple[list[str], list[str]]:
    """What is between a folder and a repo.

    Args:
        files: sha256 of each file of the folder, by its path.
        there: what the repo holds.

    Returns:
        Paths that the repo lacks or holds otherwise, and paths that it holds and the folder does not.
    """
    changed = [p for p, digest in files.items() if p not in there or not _same(folder / p, digest, there[p])]
    return changed, sorted(set(there) - set(files) - OWN)


def _same(path: Path, digest: str, held: Held) -> bool:
    if path.stat().st_size != held.size:
        return False
    if held.sha256 is not None:
        return held.sha256 == digest
    content = path.read_bytes()  # small, else it were an LFS file
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == held.blob


def commit(
    folder: Path,
    files: Mapping[str, str],
    repo: str,
    kind: str,
    head: Head,
    revision: str,
    message: str,
    create_pr: bool = False,
) -> Made:
    """Makes a repo hold a folder, in one commit on top of the one that was seen.

    Args:
        files: sha256 of each file of the folder.
        head: the repo as it was seen, which differs from the folder.
        revision: the branch; with `create_pr`, the pull request is onto it.

    Raises:
        Refusal: somebody else has committed since.
        HfsdError: an upload failed for good.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

    api, what = HfApi(), f"{kind} repo {repo}"
    changed, gone = differing(folder, files, head.files)
    tries: list[None] = []

    def send() -> Made:
        # A pull request may be there from a push that was killed, too.
        if (tries or create_pr) and (
            made := _made_already(folder, files, repo, kind, head, revision, message, create_pr)
        ):
            return made
        tries.append(None)
        sent = api.create_commit(
            repo,
            [*additions, *(CommitOperationDelete(path, is_folder=False) for path in gone)],
            repo_type=kind,
            revision=revision,
            commit_message=message,
            parent_commit=head.commit,
            create_pr=create_pr,
        )
        pull = sent.pr_revision if create_pr else None
        return Made(sent.oid, pull or revision, str(sent.pr_url) if pull else page(repo, kind, revision))

    with spoken(what):
        additions = [CommitOperationAdd(path, folder / path) for path in changed]
        # The large files first, as long as it takes: nothing of them is seen until the one commit below.
        api.preupload_lfs_files(
            repo, additions, repo_type=kind, revision=revision, create_pr=create_pr, free_memory=False
        )
        try:
            return patiently(what, send)
        except errors.HfHubHTTPError as error:
            if error.response is None or error.response.status_code != 412:
                raise
            raise Refusal(f"{what} has changed while this push went on; look at it, and push again") from error


def _made_already(
    folder: Path,
    files: Mapping[str, str],
    repo: str,
    kind: str,
    head: Head,
    revision: str,
    message: str,
    create_pr: bool,
) -> Made | None:
    """The commit whose answer was lost, if it was made."""
    from huggingface_hub import HfApi

    if not create_pr:
        now = state(repo, kind, revision)
        made = now is not None and now.commit != head.commit and not any(differing(folder, files, now.files))
        return Made(now.commit, revision, page(repo, kind, revision)) if now and made else None
    opened = HfApi().get_repo_discussions(
        repo, repo_type=kind, discussion_type="pull_request", discussion_status="open"
    )
    for pull in (p for p in opened if p.title == message):
        now = state(repo, kind, f"refs/pr/{pull.num}")
        if now and not any(differing(folder, files, now.files)):
            return Made(now.commit, f"refs/pr/{pull.num}", f"{page(repo, kind)}/discussions/{pull.num}")
    return None


def page(repo: str, kind: str, revision: str = "main") -> str:
    """The address of a repo at a branch."""
    from huggingface_hub import constants

    home = f"{constants.ENDPOINT}/{'' if kind == 'model' else f'{kind}s/'}{repo}"
    return home if revision == "main" else f"{home}/tree/{revision}"


def collect(
    namespace: str, title: str, text: str, items: Sequence[tuple[str, str, str]], private: bool, slug: str | None
) -> tuple[str, str]:
    """A collection that holds these repos in this order; what else somebody put into it stays, behind them.

    Args:
        title: of a new collection, and by which one is found of which no slug is known.
        text: at most 150 characters.
        items: repo, kind and note of each.
        slug: of the collection that an earlier push made.

    Returns:
        Its slug and its address.
    """
    from huggingface_hub import HfApi

    api, what = HfApi(), f"collection {title} of {namespace}"
    with spoken(what):
        known = patiently(what, lambda: list(api.list_collections(owner=namespace, limit=100)))
        mine = [c for c in known if c.slug == slug] or [c for c in known if c.title == title]
        if mine:
            slug = mine[0].slug
        else:
            slug = patiently(
                what,
                lambda: api.create_collection(
                    title, namespace=namespace, description=text, private=private, exists_ok=True
                ),
            ).slug
        there = patiently(what, lambda: api.get_collection(slug))
        if there.private != private:
            patiently(what, lambda: api.update_collection_metadata(slug, private=private))
        _fill(api, what, slug, there.items, items)
        final = patiently(what, lambda: api.get_collection(slug))
    return final.slug, final.url


def _fill(api: Any, what: str, slug: str, there: Iterable[Any], items: Sequence[tuple[str, str, str]]) -> None:
    """Adds what is missing, then puts everything of ours in front, in its order."""
    held = {(i.item_id, i.item_type) for i in there}
    for repo, kind, note in items:
        if (repo, kind) not in held:
            add = functools.partial(api.add_collection_item, slug, repo, kind, note=note, exists_ok=True)
            patiently(what, add)
    now = patiently(what, lambda: api.get_collection(slug)).items
    order = [(i.item_id, i.item_type) for i in now]
    ids = {(i.item_id, i.item_type): i.item_object_id for i in now}
    for position, (repo, kind, _) in enumerate(items):
        if order[position] != (repo, kind):
            patiently(what, functools.partial(api.update_collection_item, slug, ids[repo, kind], position=position))
            order.remove((repo, kind))
            order.insert(position, (repo, kind))
