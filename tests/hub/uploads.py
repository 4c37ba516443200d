"""The first and last step of an upload: preupload (how each file travels) and commit. LFS is next door."""

import base64
import json
from typing import Any

from .cards import check_card
from .discussion_routes import may_propose, next_number, record
from .errors import HubError, entry_not_found
from .messages import Request, Response, json_response, route
from .store import KINDS, LFS_THRESHOLD, Entry, Repo, is_lfs


@route("POST", "/api/KIND/REPO/preupload/REV")
def preupload(request: Request, kind: str, repo_id: str, rev: str) -> Response:
    """Regular or LFS for each file, and the id of what is there now: the client skips files that have not changed."""
    store = request.hub.store
    repo = store.repo(kind, repo_id, request.user)
    may_propose(request, repo, rev)
    if len(request.json()["files"]) > 256:
        raise HubError(413, "At most 256 files in one preupload")
    current = store.resolve(repo, rev).files
    files = []
    for item in request.json()["files"]:
        path, sample = item["path"], base64.b64decode(item.get("sample", ""))
        mode = "lfs" if is_lfs(path, item["size"], sample) else "regular"
        known = {"oid": current[path].etag} if path in current else {}
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
    return json_response({"files": files})


@route("POST", "/api/KIND/REPO/commit/REV")
def commit(request: Request, kind: str, repo_id: str, rev: str) -> Response:
    store = request.hub.store
    repo = store.repo(kind, repo_id, request.user)
    author = may_propose(request, repo, rev)
    try:
        lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    except ValueError as error:
        raise HubError(400, f"Commit is not ndjson: {error}") from error
    if not lines or lines[0].get("key") != "header" or not lines[0]["value"].get("summary"):
        raise HubError(400, "The first line of a commit must be a header with a summary")
    header = lines[0]["value"]
    changes = _changes(request, repo, rev, lines[1:])
    _check_readme(request, repo, changes)
    ref = rev if rev.startswith("refs/") else f"refs/heads/{rev}"
    parent, title, message = header.get("parentCommit"), header["summary"], header.get("description") or ""
    with store.lock:  # the number of a new pull request must not be taken in between
        number = next_number(store, repo)
        new_ref = f"refs/pr/{number}" if request.flag("create_pr") else None
        made = store.add_commit(repo, ref, parent, title, message, author, changes, new_ref=new_ref)
        if new_ref:
            record(store, repo, author, title, message, ref, "open")
    site = f"{request.hub.endpoint}/{repo.prefix}"
    answer = {"success": True, "commitUrl": f"{site}/commit/{made.id}", "commitOid": made.id, "hookOutput": ""}
    return json_response(answer | ({"pullRequestUrl": f"{site}/discussions/{number}"} if new_ref else {}))


def _changes(request: Request, repo: Repo, rev: str, lines: list[dict[str, Any]]) -> dict[str, Entry | None]:
    """Operations in their order, so that a folder can be deleted and filled again in one commit."""
    store = request.hub.store
    head = store.resolve(repo, rev)
    changes: dict[str, Entry | None] = {}
    for line in lines:
        key, value = line.get("key"), line.get("value", {})
        path = str(value.get("path", ""))
        if not path.strip("/") or {"", ".", "..", ".git"} & set(path.rstrip("/").split("/")):
            raise HubError(400, f"Invalid path {path!r}")
        if key == "file":
            changes[path] = _regular(request, path, value)
        elif key == "lfsFile":
            changes[path] = store.lfs_entry(value["oid"])
        elif key == "deletedFile":
            changes[path] = None
        elif key == "deletedFolder":
            inside = [p for p in head.files if p.startswith(path.rstrip("/") + "/")]
            if not inside:
                raise entry_not_found(path, head.id)
            changes |= dict.fromkeys(inside)
        else:
            raise HubError(400, f"Unknown operation {key!r}")
    return changes


def _regular(request: Request, path: str, value: dict[str, Any]) -> Entry:
    raw = str(value["content"])
    content = base64.b64decode(raw) if value.get("encoding") == "base64" else raw.encode()
    if len(content) > LFS_THRESHOLD:
        raise HubError(400, f"{path} has {len(content)} bytes: files over {LFS_THRESHOLD} must go through LFS")
    return request.hub.store.regular_entry(content)


def _check_readme(request: Request, repo: Repo, changes: dict[str, Entry | None]) -> None:
    """The Hub refuses a commit with a broken card even if the client did not ask it to validate first."""
    if readme := changes.get("README.md"):
        repo_type = next(name for name, kind in KINDS.items() if kind == repo.kind)
        errors, _ = check_card(request.hub.store.read(readme).decode(errors="replace"), repo_type)
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))
