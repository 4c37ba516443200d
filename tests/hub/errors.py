"""Failures in the form the client reads: a status, and the X-Error-Code that picks its exception class."""

from typing import Any


class HubError(Exception):
    """Becomes the response of the request that raised it.

    Args:
        status: HTTP status.
        message: shown by the client; also in X-Error-Message.
        code: X-Error-Code: RepoNotFound, RevisionNotFound or EntryNotFound.
        body: JSON body; `{"error": message}` when omitted.
        headers: further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.body = body or {"error": message}
        one_line = " ".join(message.encode("ascii", "replace").decode().split())
        self.headers = {"X-Error-Message": one_line, **({"X-Error-Code": code} if code else {}), **(headers or {})}


def repo_not_found() -> HubError:
    # The Hub answers 401 without a token; the client maps that to RepositoryNotFoundError only on https URLs,
    # so on loopback 404 with the code is what gives the same exception.
    return HubError(404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, commit: str) -> HubError:
    # The commit lets the client cache that the file does not exist.
    return HubError(404, f"Entry not found: {path}", "EntryNotFound", headers={"X-Repo-Commit": commit})
