"""Who may read and change a repository: its settings, gates and the requests for access, and the check of both."""

from datetime import UTC, datetime
from typing import Any

from .errors import HubError
from .messages import Request, Response, json_response, paged, route
from .store import Repo, git_oid

STATUSES = ("accepted", "pending", "rejected")


def check_gate(request: Request, repo: Repo) -> None:
    """Lets pass who may see the files of a gated repository; its name, card data and list of files are public.

    Raises:
        HubError: 401 without a token, 403 for a user whom the owner has not let in; both `GatedRepo`.
    """
    if not repo.meta.get("gated") or request.hub.accounts.may_read(request.user, repo.namespace):
        return
    start = f"Access to {repo.kind[:-1]} {repo.id} is restricted"
    if request.user is None:
        raise HubError(
            401, f"{start}. You must have access to it and be authenticated to access it. Please log in.", "GatedRepo"
        )
    if repo.meta.get("access", {}).get(request.user) != "accepted":
        where = f"{request.hub.endpoint}/{repo.prefix}"
        message = f"{start} and you are not in the authorized list. Visit {where} to ask for access."
        raise HubError(403, message, "GatedRepo")


@route("GET", "/api/KIND/REPO/auth-check(?P<write>/write)?")
def auth_check(request: Request, kind: str, repo_id: str, write: str = "") -> Response:
    repo = request.hub.store.repo(kind, repo_id, request.user)
    check_gate(request, repo)
    if write:
        request.writer(repo.namespace)
    return json_response({})


@route("PUT", "/api/KIND/REPO/settings")
def settings(request: Request, kind: str, repo_id: str) -> Response:
    """Visibility and gate."""
    store, body = request.hub.store, request.json()
    repo = store.repo(kind, repo_id, request.user)
    request.writer(repo.namespace)
    changes: dict[str, Any] = {}
    if "gated" in body:
        changes["gated"] = body["gated"]
    if "private" in body or "visibility" in body:
        changes["private"] = bool(body.get("private")) or body.get("visibility") == "private"
    store.update(repo, **changes)
    return json_response({**changes, "id": repo.id})


def _owned(request: Request, kind: str, repo_id: str) -> Repo:
    """A gated repository of the user who asks."""
    repo = request.hub.store.repo(kind, repo_id, request.user)
    request.writer(repo.namespace)
    if not repo.meta.get("gated"):
        raise HubError(400, "This repository is not gated")
    return repo


def _decide(request: Request, repo: Repo, user: str, status: str) -> Response:
    if not request.hub.accounts.known(user):
        raise HubError(404, f"No such user: {user}")
    with request.hub.store.lock:
        access = request.hub.store.now(repo).meta.get("access", {})
        request.hub.store.update(repo, access=access | {user: status})
    return json_response({})


@route("POST", "/api/KIND/REPO/user-access-request/grant")
def grant_access(request: Request, kind: str, repo_id: str) -> Response:
    repo, user = _owned(request, kind, repo_id), request.json()["user"]
    if repo.meta.get("access", {}).get(user) == "accepted":
        raise HubError(400, f"{user} already has access")
    return _decide(request, repo, user, "accepted")


@route("POST", "/api/KIND/REPO/user-access-request/handle")
def handle_access(request: Request, kind: str, repo_id: str) -> Response:
    repo, body = _owned(request, kind, repo_id), request.json()
    status = body.get("status")
    if status not in STATUSES:
        raise HubError(400, f"Unknown status {status!r}")
    return _decide(request, repo, body["user"], status)


@route("GET", f"/api/KIND/REPO/user-access-request/(?P<status>{'|'.join(STATUSES)})")
def list_access(request: Request, kind: str, repo_id: str, status: str) -> Response:
    repo = _owned(request, kind, repo_id)
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return paged(
        request,
        [
            {
                "requestId": git_oid("blob", f"{repo.prefix} {user}".encode())[:24],
                "user": {"user": user, "fullname": user, "email": None},
                "status": status,
                "timestamp": now,
            }
            for user, granted in sorted(repo.meta.get("access", {}).items())
            if granted == status
        ],
    )


@route("POST", "/REPO/ask-access")
@route("POST", "/(?P<kind>datasets|spaces)/REPO/ask-access")
def ask_access(request: Request, repo_id: str, kind: str = "models") -> Response:
    """The button on a gated repository's page: an "auto" gate lets in at once, a "manual" one waits for the owner."""
    user, repo = request.signed_in(), request.hub.store.repo(kind, repo_id, request.user)
    if not repo.meta.get("gated"):
        raise HubError(400, "This repository is not gated")
    return _decide(request, repo, user, "accepted" if repo.meta["gated"] == "auto" else "pending")
