"""Requests and responses between the socket (server.py) and the routes; no protocol of the Hub in here."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import parse_qs, unquote, urlencode

from .errors import HubError

if TYPE_CHECKING:
    from .server import LoopbackHub


@dataclass
class Request:
    hub: "LoopbackHub"
    method: str
    path: str  # still percent-encoded: a revision may hold an encoded slash
    query: dict[str, list[str]]
    headers: dict[str, str]  # names in lower case
    user: str | None
    token: str | None
    stream: BinaryIO | None  # body not read yet; only for PUT of a blob
    body: bytes = b""

    def json(self) -> dict[str, Any]:
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"Body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise HubError(400, "Body must be a JSON object")
        return value

    def form(self) -> dict[str, list[str]]:
        """Lists of values, from a form (what the client sends) or from JSON."""
        if "json" in self.headers.get("content-type", ""):
            return {k: v if isinstance(v, list) else [v] for k, v in self.json().items()}
        return parse_qs(self.body.decode())

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")

    def signed_in(self) -> str:
        """The user who asks; 401 without a token."""
        if self.user is None or self.token is None:
            raise HubError(401, "Invalid username or password.")
        return self.user

    def writer(self, namespace: str | None = None, permission: str = "repo.write") -> str:
        """The user who writes; 401 without a token, 403 with a read-only one or in somebody else's namespace."""
        user = self.signed_in()
        if not self.hub.accounts.allows(self.token or "", permission):
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        if namespace is not None and not self.hub.accounts.may_write(user, namespace):
            raise HubError(403, f"You don't have the rights to write under the namespace {namespace!r}")
        return user


@dataclass
class Response:
    """`file` is sent in place of `body`; `start` and `length` are the bytes of it that were asked for."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    start: int = 0
    length: int = 0


Handler = Callable[..., Response]
ROUTES: list[tuple[str, re.Pattern[str], Handler]] = []


def route(method: str, pattern: str) -> Callable[[Handler], Handler]:
    """Registers a handler. KIND, REPO, REV and SLUG in the pattern are segments; named groups become arguments."""
    for word, regex in (
        ("KIND", "(?P<kind>models|datasets|spaces)"),
        ("REPO", "(?P<repo_id>[^/]+/[^/]+)"),
        ("SLUG", "(?P<slug>[^/]+/[^/]+)"),
        ("REV", "(?P<rev>refs/(?:heads|tags|pr)/[^/]+|[^/]+)"),
    ):
        pattern = pattern.replace(word, regex)

    def add(handler: Handler) -> Handler:
        ROUTES.append((method, re.compile(pattern), handler))
        return handler

    return add


def dispatch(request: Request) -> Response:
    """Runs the first route that fits; every miss is loud, so that a new call of the client is seen at once."""
    for method, pattern, handler in ROUTES:
        if method == request.method and (match := pattern.fullmatch(request.path)):
            return handler(request, **{k: unquote(v) for k, v in match.groupdict().items() if v is not None})
    raise HubError(501, f"The loopback Hub has no route for {request.method} {request.path}")


def json_response(value: Any, status: int = 200) -> Response:
    # default=str: YAML dates in card metadata
    return Response(status, json.dumps(value, default=str).encode(), {"Content-Type": "application/json"})


def paged(request: Request, items: list[Any]) -> Response:
    """One page of a list, with the address of the next in `Link`, as on the Hub; `limit` is the size of a page."""
    size = int(request.query.get("limit", [str(request.hub.page_size)])[0])
    start = int(request.query.get("cursor", ["0"])[0])
    response = json_response(items[start : start + size])
    if start + size < len(items):
        query = urlencode(request.query | {"cursor": [str(start + size)]}, doseq=True)
        response.headers["Link"] = f'<{request.hub.endpoint}{request.path}?{query}>; rel="next"'
    return response


def file_response(request: Request, path: Path, etag: str, headers: dict[str, str] | None = None) -> Response:
    """Serves a file whole or, with a `Range` header, in part (one range; several are answered in full)."""
    size = path.stat().st_size
    common = {
        "Content-Type": "application/octet-stream",
        "ETag": f'"{etag}"',
        "Accept-Ranges": "bytes",
        **(headers or {}),
    }
    if request.headers.get("if-none-match") in (f'"{etag}"', "*"):
        return Response(304, headers={"ETag": f'"{etag}"'})
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if not match or match[0] == "bytes=-":
        return Response(200, headers=common, file=path, length=size)
    first, last = match.groups()
    start = int(first) if first else max(size - int(last), 0)
    stop = min(int(last) + 1, size) if first and last else size
    if start >= stop:
        raise HubError(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{size}"})
    common["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
    return Response(206, headers=common, file=path, start=start, length=stop - start)
