"""Repositories on disk: content-addressed blobs, commits as JSON, refs that move atomically.

    ROOT/blobs/ab/abcd...                       every file once, by sha256, LFS or not
    ROOT/repos/{models,datasets,spaces}/NS/NAME/meta.json         owner's settings and refs
    ROOT/repos/.../commits/COMMIT.json          parent, message, path -> Entry; never rewritten

Object ids are git's own (blob, tree, commit), so a client that hashes a local file finds the id the server reports.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from .errors import HubError, entry_not_found, repo_not_found, revision_not_found
from .faults import flipped

KINDS = {"model": "models", "dataset": "datasets", "space": "spaces"}
LFS_SUFFIXES = (".safetensors", ".parquet", ".gguf", ".bin", ".png", ".pt", ".arrow", ".zip", ".gz", ".npz")
LFS_THRESHOLD = 10 * 1024 * 1024  # bytes; the Hub refuses larger files outside LFS
_NAME = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9_](?:[\w.-]{0,94}[A-Za-z0-9_])?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 20


def git_oid(kind: str, payload: bytes) -> str:
    """sha1 that git gives an object of this kind ("blob", "tree", "commit")."""
    return hashlib.sha1(b"%s %d\0" % (kind.encode(), len(payload)) + payload).hexdigest()


def is_lfs(path: str, size: int, sample: bytes = b"") -> bool:
    """Whether the Hub would keep this file in LFS: by name, by size, or because its first bytes are binary."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_THRESHOLD or b"\0" in sample)


@dataclass(frozen=True)
class Entry:
    """One file of one commit. `oid` is git's; for an LFS file it is the id of the pointer, as on the Hub."""

    oid: str
    size: int
    sha256: str
    lfs: bool

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    @property
    def pointer(self) -> bytes:
        """What git holds in place of an LFS file."""
        return _pointer(self.sha256, self.size)

    @property
    def pointer_size(self) -> int:
        return len(self.pointer)


def _pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


@dataclass(frozen=True)
class Commit:
    id: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, Entry]


@dataclass(frozen=True)
class Repo:
    kind: str  # "models", "datasets" or "spaces", as in API paths
    id: str
    folder: Path
    meta: dict[str, Any]

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def prefix(self) -> str:
        """Path of the repository on the site: models live at the root."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    @property
    def refs(self) -> dict[str, str]:
        return self.meta["refs"]


def tree_oids(files: dict[str, Entry]) -> dict[str, str]:
    """git's tree id of every folder; the root is ""."""
    folders: dict[str, dict[str, bytes]] = {"": {}}
    for path, entry in files.items():
        parent, _, name = path.rpartition("/")
        folders.setdefault(parent, {})[name] = b"100644 " + name.encode() + b"\0" + bytes.fromhex(entry.oid)
        while parent:
            parent = parent.rpartition("/")[0]
            folders.setdefault(parent, {})
    oids = {}
    for folder in sorted(folders, key=lambda f: (f != "", f.count("/")), reverse=True):  # children before parents
        # git sorts a folder as if its name ended with a slash; the modes tell files from folders
        items = sorted(folders[folder].items(), key=lambda kv: kv[0] + ("/" if kv[1].startswith(b"40000 ") else ""))
        oids[folder] = git_oid("tree", b"".join(line for _, line in items))
        if folder:
            parent, _, name = folder.rpartition("/")
            folders[parent][name] = b"40000 " + name.encode() + b"\0" + bytes.fromhex(oids[folder])
    return oids


class Store:
    """All state of the server. Safe for many threads of one process; readers never see half a commit.

    Args:
        root: folder that holds it.
        may_read: whether a user (None: nobody) is shown the private repositories of a namespace.
    """

    def __init__(self, root: Path, may_read: Callable[[str | None, str], bool] = lambda user, name: user == name):
        self.root = Path(root)
        self.may_read = may_read
        self.lock = threading.RLock()
        (self.root / "blobs").mkdir(parents=True, exist_ok=True)

    # blobs

    def blob(self, sha256: str) -> Path:
        return self.root / "blobs" / sha256[:2] / sha256

    def put_blob(self, chunks: Iterable[bytes], expect: str | None = None) -> tuple[str, int]:
        """Stores a stream under its sha256.

        Returns:
            The sha256 and the size in bytes.

        Raises:
            HubError: 400, when the content is not the `expect`ed one.
        """
        digest, size = hashlib.sha256(), 0
        with tempfile.NamedTemporaryFile(dir=self.root / "blobs", delete=False) as out:
            try:
                for chunk in chunks:
                    out.write(chunk)
                    digest.update(chunk)
                    size += len(chunk)
                sha256 = digest.hexdigest()
                if expect not in (None, sha256):
                    raise HubError(400, f"Uploaded content has sha256 {sha256}, not {expect}")
                self.blob(sha256).parent.mkdir(exist_ok=True)
                os.replace(out.name, self.blob(sha256))
            except BaseException:
                Path(out.name).unlink(missing_ok=True)
                raise
        return sha256, size

    def read(self, entry: Entry) -> bytes:
        return self.blob(entry.sha256).read_bytes()

    def regular_entry(self, content: bytes) -> Entry:
        sha256, size = self.put_blob([content])
        return Entry(git_oid("blob", content), size, sha256, lfs=False)

    def lfs_entry(self, sha256: str) -> Entry:
        if not self.blob(sha256).is_file():
            raise HubError(400, f"LFS object {sha256} was never uploaded")
        size = self.blob(sha256).stat().st_size
        return Entry(git_oid("blob", _pointer(sha256, size)), size, sha256, lfs=True)

    # repositories

    def _folder(self, kind: str, repo_id: str) -> Path:
        namespace, _, name = repo_id.partition("/")
        if not (_NAME.fullmatch(namespace) and _NAME.fullmatch(name)):
            raise HubError(400, f"Invalid repository name {repo_id!r}")
        return self.root / "repos" / kind / namespace / name

    def repo(self, kind: str, repo_id: str, user: str | None) -> Repo:
        """Raises RepoNotFound also for a private repository of somebody else, as the Hub does."""
        try:
            folder = self._folder(kind, repo_id)
            repo = Repo(kind, repo_id, folder, json.loads((folder / "meta.json").read_text()))
        except (HubError, OSError) as error:
            raise repo_not_found() from error
        if repo.meta["private"] and not self.may_read(user, repo.namespace):
            raise repo_not_found()
        return repo

    def repos(self, kind: str, user: str | None) -> Iterator[Repo]:
        for meta in sorted((self.root / "repos" / kind).glob("*/*/meta.json")):
            try:
                yield self.repo(kind, f"{meta.parent.parent.name}/{meta.parent.name}", user)
            except HubError:
                continue  # private, or deleted since the listing

    def create(self, kind: str, repo_id: str, author: str, files: dict[str, Entry], **settings: Any) -> Repo:
        """Creates a repository whose first commit holds `files`; 409 (no body) if it exists."""
        folder = self._folder(kind, repo_id)
        with self.lock:
            if (folder / "meta.json").exists():
                raise HubError(409, f"You already created this {kind[:-1]} repo: {repo_id}")
            repo = Repo(kind, repo_id, folder, {"private": False, "created": _now(), "refs": {}, **settings})
            first = self._write_commit(repo, None, "initial commit", "", author, files)
            self.set_ref(repo, "refs/heads/main", first.id)
            return repo

    def delete(self, repo: Repo) -> None:
        with self.lock:
            shutil.rmtree(repo.folder)

    # commits and refs

    def commit(self, repo: Repo, oid: str) -> Commit:
        raw = json.loads((repo.folder / "commits" / f"{oid}.json").read_text())
        return Commit(**{**raw, "files": {path: Entry(**entry) for path, entry in raw["files"].items()}})

    def resolve(self, repo: Repo, revision: str) -> Commit:
        """Commit of a branch, a tag, a full ref such as refs/pr/1, or a full commit id."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in repo.refs:
                return self.commit(repo, repo.refs[ref])
        if _COMMIT.fullmatch(revision) and (repo.folder / "commits" / f"{revision}.json").is_file():
            return self.commit(repo, revision)
        raise revision_not_found(revision)

    def history(self, repo: Repo, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        yield commit
        while commit.parent:
            commit = self.commit(repo, commit.parent)
            yield commit

    def add_commit(
        self,
        repo: Repo,
        ref: str,
        parent: str | None,
        title: str,
        message: str,
        author: str,
        changes: dict[str, Entry | None],
        *,
        new_ref: str | None = None,
    ) -> Commit:
        """Commits on top of `ref`, or on `parent` when the commit opens `new_ref` (a pull request).

        Args:
            parent: what the client saw (full id, or its first 7 or more digits); 412 if `ref` has moved on since.
            changes: path -> new entry, or None to delete the path.
        """
        with self.lock:
            repo = self.repo(repo.kind, repo.id, repo.namespace)  # refs as they are now
            if ref not in repo.refs:
                raise revision_not_found(ref)
            head = self.commit(repo, repo.refs[ref])
            if parent and new_ref:
                head = self.resolve(repo, parent)
            elif parent and not head.id.startswith(parent):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            files = {**head.files, **{path: entry for path, entry in changes.items() if entry}}
            for path in (path for path, entry in changes.items() if entry is None):
                if files.pop(path, None) is None:
                    raise entry_not_found(path, head.id)
            commit = self._write_commit(repo, head.id, title, message, author, files)
            self.set_ref(repo, new_ref or ref, commit.id)
            return commit

    def replace(self, repo: Repo, revision: str, paths: Iterable[str]) -> None:
        """Puts changed content, with its own hashes, in place of files of a commit that keeps its id: a fault."""
        commit = self.resolve(repo, revision)
        files = dict(commit.files)
        for path in paths:
            sha256, _ = self.put_blob([flipped(self.read(files[path]))])
            regular = Entry(git_oid("blob", self.blob(sha256).read_bytes()), files[path].size, sha256, lfs=False)
            files[path] = self.lfs_entry(sha256) if files[path].lfs else regular
        changed = asdict(replace(commit, files=files))
        write_json(repo.folder / "commits" / f"{commit.id}.json", changed)

    def set_ref(self, repo: Repo, ref: str, oid: str | None) -> None:
        """Moves or creates a ref; removes it when `oid` is None."""
        with self.lock:
            repo = self.now(repo)
            refs = {name: target for name, target in repo.refs.items() if name != ref}
            self.update(repo, refs=refs | ({ref: oid} if oid else {}))

    def now(self, repo: Repo) -> Repo:
        """The repository as it is on disk; as given while it is being created."""
        exists = (repo.folder / "meta.json").exists()
        return self.repo(repo.kind, repo.id, repo.namespace) if exists else repo

    def update(self, repo: Repo, **settings: Any) -> None:
        """Changes settings of a repository (what meta.json holds); the others stay as they are on disk."""
        with self.lock:
            write_json(repo.folder / "meta.json", {**self.now(repo).meta, **settings})

    def _write_commit(
        self, repo: Repo, parent: str | None, title: str, message: str, author: str, files: dict[str, Entry]
    ) -> Commit:
        date = _now()
        header = f"tree {tree_oids(files)['']}\n" + (f"parent {parent}\n" if parent else "")
        oid = git_oid("commit", f"{header}author {author} {date}\n\n{title}\n\n{message}".encode())
        commit = Commit(oid, parent, title, message, author, date, dict(sorted(files.items())))
        write_json(repo.folder / "commits" / f"{oid}.json", asdict(commit))
        return commit


def write_json(path: Path, value: Any) -> None:
    """Replaces the file in one step, so that a reader in another thread never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as out:
        json.dump(value, out, indent=1)
    os.replace(out.name, path)


def read_chunks(stream: BinaryIO, length: int) -> Iterator[bytes]:
    """Exactly `length` bytes of a socket stream, in pieces; 400 if the client hangs up early."""
    while length > 0:
        chunk = stream.read(min(_CHUNK, length))
        if not chunk:
            raise HubError(400, "Request body ended early")
        length -= len(chunk)
        yield chunk


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
