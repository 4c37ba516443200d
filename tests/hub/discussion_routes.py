"""Discussions and pull requests. A pull request is a discussion with the ref `refs/pr/N`; numbers are shared."""

from datetime import UTC, datetime
from typing import Any

from .errors import HubError
from .messages import Request, Response, json_response, route
from .store import KINDS, Commit, Entry, Repo, Store, git_oid

_PAGE = 50


def may_propose(request: Request, repo: Repo, rev: str) -> str:
    """The user who writes to a revision: anybody may open a pull request and add to one of theirs, as on the Hub."""
    if request.flag("create_pr"):
        return request.writer()
    if rev.startswith("refs/pr/") and rev in repo.refs:
        number = int(rev.rpartition("/")[2])
        if _all(repo)[number - 1]["author"] == request.user:
            return request.writer()
    return request.writer(repo.namespace)


def _all(repo: Repo) -> list[dict[str, Any]]:
    return repo.meta.get("discussions", [])


def next_number(store: Store, repo: Repo) -> int:
    """What the next discussion will be called; hold the store's lock until it is there."""
    return len(_all(store.now(repo))) + 1


def record(store: Store, repo: Repo, author: str, title: str, text: str, base: str | None, status: str) -> int:
    """Adds a discussion, or with a `base` (full ref) a pull request onto it; its own ref is the caller's work."""
    with store.lock:
        every = _all(store.now(repo))
        made = {"num": len(every) + 1, "title": title, "author": author, "createdAt": _now(), "status": status}
        made |= {"base": base, "events": [_event(author, "comment", _said(text))] if text else []}
        store.update(repo, discussions=[*every, made])
    return made["num"]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _said(text: str) -> dict[str, Any]:
    return {"edited": False, "hidden": False, "latest": {"raw": text}}


def _event(author: str, kind: str, data: dict[str, Any]) -> dict[str, Any]:
    event_id = git_oid("blob", f"{author} {kind} {_now()}".encode())[:24]
    return {"id": event_id, "type": kind, "createdAt": _now(), "author": {"name": author}, "data": data}


def _told(repo: Repo, one: dict[str, Any]) -> dict[str, Any]:
    type_ = next(name for name, kind in KINDS.items() if kind == repo.kind)
    facts = {key: one[key] for key in ("num", "title", "createdAt", "status")}
    author, pull = {"name": one["author"]}, one["base"] is not None
    return {**facts, "author": author, "repo": {"name": repo.id, "type": type_}, "isPullRequest": pull}


def _found(request: Request, kind: str, repo_id: str, number: str) -> tuple[Repo, dict[str, Any]]:
    repo = request.hub.store.repo(kind, repo_id, request.user)
    if not 0 < int(number) <= len(_all(repo)):
        raise HubError(404, f"No discussion {number} in {repo_id}")
    return repo, _all(repo)[int(number) - 1]


@route("GET", "/api/KIND/REPO/discussions")
def list_discussions(request: Request, kind: str, repo_id: str) -> Response:
    repo = request.hub.store.repo(kind, repo_id, request.user)
    query = {name: values[0] for name, values in request.query.items()}
    found = [_told(repo, one) for one in reversed(_all(repo))]
    if (wanted := query.get("type", "all")) != "all":
        found = [one for one in found if one["isPullRequest"] == (wanted == "pull_request")]
    if (status := query.get("status", "all")) != "all":
        found = [one for one in found if (one["status"] in ("open", "draft")) == (status == "open")]
    found = [one for one in found if query.get("author") in (None, one["author"]["name"])]
    start = int(query.get("p", 0)) * _PAGE
    return json_response({"discussions": found[start : start + _PAGE], "count": len(found), "start": start})


@route("POST", "/api/KIND/REPO/discussions")
def open_discussion(request: Request, kind: str, repo_id: str) -> Response:
    store, body, author = request.hub.store, request.json(), request.writer()
    repo = store.repo(kind, repo_id, request.user)
    title, text = str(body.get("title", "")), str(body.get("description") or "")
    if not 3 <= len(title) <= 200:
        raise HubError(400, '"title" must have 3 to 200 characters')
    if not body.get("pullRequest"):
        return json_response({"num": record(store, repo, author, title, text, None, "open")})
    with store.lock:
        number = record(store, repo, author, title, text, "refs/heads/main", "draft")
        store.set_ref(repo, f"refs/pr/{number}", store.resolve(repo, "main").id)
    return json_response({"num": number, "pullRequest": True})


@route("GET", "/api/KIND/REPO/discussions/(?P<number>[0-9]+)")
def discussion(request: Request, kind: str, repo_id: str, number: str) -> Response:
    repo, one = _found(request, kind, repo_id, number)
    details = _told(repo, one) | {"events": one["events"], "filesWithConflicts": False, "diff": ""}
    if one["base"]:
        changes, conflicts = _merged(request.hub.store, repo, one)
        details |= {"changes": {"base": one["base"], "mergeCommitId": one.get("merged")}}
        details |= {"filesWithConflicts": conflicts, "diff": "".join(f"{path}\n" for path in sorted(changes))}
    return json_response(details)


def _merged(store: Store, repo: Repo, one: dict[str, Any]) -> tuple[dict[str, Entry | None], list[str]]:
    """What the pull request changes, and which of it has changed on its base since."""
    main, pull = store.resolve(repo, one["base"]), store.resolve(repo, f"refs/pr/{one['num']}")
    known = {commit.id for commit in store.history(repo, main)}
    start = next(commit for commit in store.history(repo, pull) if commit.id in known)
    changes = _changes(start, pull)
    meanwhile = _changes(start, main)
    clashes = sorted(path for path in changes if path in meanwhile and changes[path] != meanwhile[path])
    return changes, [] if one.get("merged") else clashes


def _changes(old: Commit, new: Commit) -> dict[str, Entry | None]:
    paths = {*old.files, *new.files}
    return {path: new.files.get(path) for path in paths if old.files.get(path) != new.files.get(path)}


def _change(request: Request, repo: Repo, one: dict[str, Any], event: dict[str, Any], **facts: Any) -> None:
    with request.hub.store.lock:
        every = list(_all(request.hub.store.now(repo)))
        every[one["num"] - 1] = {**one, **facts, "events": [*one["events"], event]}
        request.hub.store.update(repo, discussions=every)


@route("POST", "/api/KIND/REPO/discussions/(?P<number>[0-9]+)/comment")
def comment(request: Request, kind: str, repo_id: str, number: str) -> Response:
    with request.hub.store.lock:
        repo, one = _found(request, kind, repo_id, number)
        event = _event(request.writer(), "comment", _said(str(request.json()["comment"])))
        _change(request, repo, one, event)
    return json_response({"newMessage": event})


@route("POST", "/api/KIND/REPO/discussions/(?P<number>[0-9]+)/status")
def change_status(request: Request, kind: str, repo_id: str, number: str) -> Response:
    with request.hub.store.lock:
        repo, one = _found(request, kind, repo_id, number)
        author = request.writer(None if one["author"] == request.user else repo.namespace)
        status = request.json()["status"]
        event = _event(author, "status-change", {"status": status})
        _change(request, repo, one, event, status=status)
    return json_response({"newStatus": event})


@route("POST", "/api/KIND/REPO/discussions/(?P<number>[0-9]+)/merge")
def merge(request: Request, kind: str, repo_id: str, number: str) -> Response:
    """One commit on the base with the pull request's changes; 409 where both have changed the same file."""
    store = request.hub.store
    with store.lock:
        repo, one = _found(request, kind, repo_id, number)
        author = request.writer(repo.namespace)
        if not one["base"] or one["status"] in ("closed", "merged"):
            raise HubError(400, f"Discussion {number} is no open pull request")
        changes, conflicts = _merged(store, repo, one)
        if conflicts:
            raise HubError(409, f"Merge conflicts in {', '.join(conflicts)}")
        title = f"{one['title']} (#{number})"
        made = store.add_commit(repo, one["base"], None, title, "", author, changes)
        event = _event(author, "status-change", {"status": "merged"})
        _change(request, repo, one, event, status="merged", merged=made.id)
    return json_response({"commitId": made.id})
