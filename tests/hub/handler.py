"""The socket side of the server: reads requests, lets the planned faults happen, and writes the answers."""

import json
import socket
import struct
import time
import traceback
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from . import (  # noqa: F401  (imported to register their routes)
    access_routes,
    collection_routes,
    discussion_routes,
    lfs_routes,
    listing,
    routes,
    uploads,
)
from .errors import HubError
from .faults import Fault, damage, flipped
from .messages import Request, Response, dispatch

if TYPE_CHECKING:
    from .server import LoopbackHub, _Server

_STREAMED = ("/blobs/", "/parts/")  # their bodies go to disk as they come


class _Cut(Exception):
    """The fault has closed the connection: there is nobody to answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive; every response states its length
    server: "_Server"
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer may wait 40 ms
    server_version = "LoopbackHub"

    def _answer(self) -> None:
        hub = self.server.hub
        fault = hub.faults.take(self.command, self.path)
        try:
            response = self._respond(hub, fault)
        except _Cut:
            self._record(0, 0, fault)
            return
        sent = 0 if self.command == "HEAD" else response.length
        self._record(response.status, sent, fault)
        self._send(response, fault)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def _record(self, status: int, sent: int, fault: Fault | None) -> None:
        self.server.hub.record(self.command, self.path, status, sent, fault.kind if fault else "")

    def do_CONNECT(self) -> None:
        """`hub_env` names this server as proxy: what the client asks of the outside world ends here, on record."""
        self._record(403, 0, None)
        self.close_connection = True
        self._send(Response(403))

    def _respond(self, hub: "LoopbackHub", fault: Fault | None) -> Response:
        try:
            if fault:
                self._before(fault)
            response = dispatch(self._request(hub))
            if fault:
                self._after(fault)
            return response
        except HubError as error:
            self._discard(error.status)
            body = json.dumps(error.body).encode()
            return Response(error.status, body, {"Content-Type": "application/json", **error.headers})
        except _Cut:
            raise
        except Exception as error:  # a bug of ours: 500 makes the client retry, 501 shows it at once
            traceback.print_exc()
            self.close_connection = True
            return Response(501, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())

    def _request(self, hub: "LoopbackHub") -> Request:
        parts = urlsplit(self.path)
        if parts.scheme:
            raise HubError(403, f"No way out of loopback: {self.path}")
        headers = {name.lower(): value for name, value in self.headers.items()}
        streamed = self._streamed()
        if "chunked" in headers.get("transfer-encoding", ""):
            raise HubError(411, "Send a Content-Length")
        body = b"" if streamed else self.rfile.read(self._length())
        token = headers["authorization"].removeprefix("Bearer ") if "authorization" in headers else None
        if token is not None and token not in hub.users:
            # on reads too, as on the Hub: a wrong token is worse than none
            raise HubError(401, "Invalid credentials in Authorization header")
        user = hub.users[token] if token is not None else None
        stream = self.rfile if streamed else None
        query = parse_qs(parts.query)
        return Request(hub, self.command, parts.path, query, headers, user, token, stream, body)  # type: ignore[arg-type]

    def _streamed(self) -> bool:
        return self.command == "PUT" and self.path.startswith(_STREAMED)

    def _length(self) -> int:
        return int(self.headers.get("content-length", 0))

    def _discard(self, status: int) -> None:
        """A refused upload leaves its body in the socket, where it would be read as the next request."""
        if self._streamed() or status == 411:
            self.close_connection = True

    def _send(self, response: Response, fault: Fault | None = None) -> None:
        length = response.length if response.file else len(response.body)
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD" or response.status == 304:
            return
        if fault and fault.kind in ("cut", "reset", "corrupt"):
            self._send_badly(response, fault)
        elif response.file is None:
            self.wfile.write(response.body)
        elif length:
            with response.file.open("rb") as file:
                self.connection.sendfile(file, response.start, length)

    # faults

    def _before(self, fault: Fault) -> None:
        """What a fault does before the request is carried out."""
        if fault.kind == "slow":
            time.sleep(fault.seconds)
        elif fault.kind == "status":
            self.rfile.read(self._length())
            raise HubError(fault.status, f"Fault on demand: {fault.status}", headers=fault.headers)
        elif fault.kind in ("cut", "reset") and (self._length() or self.command == "HEAD"):
            self.rfile.read(self._length() // 2)
            self._close(reset=fault.kind == "reset")

    def _after(self, fault: Fault) -> None:
        """What a fault does once the request was carried out."""
        if fault.kind == "lost":
            self._close(reset=False)
        elif fault.kind == "corrupt" and self._stores():
            damage([self.server.hub.store.blob(self.path.rpartition("/")[2])])

    def _stores(self) -> bool:
        """Whether the request ends with a blob in the store."""
        return self.command in ("PUT", "POST") and self.path.startswith(("/blobs/", "/api/complete_multipart/"))

    def _send_badly(self, response: Response, fault: Fault) -> None:
        body = response.body
        if response.file:
            body = response.file.read_bytes()[response.start : response.start + response.length]
        if fault.kind == "corrupt":
            self.wfile.write(body if self._stores() else flipped(body))
            return
        self.wfile.write(body[: len(body) // 2])
        if fault.kind == "reset":
            time.sleep(0.05)  # it drops what the peer has not read yet
        with suppress(_Cut):  # the answer is on record
            self._close(reset=fault.kind == "reset")

    def _close(self, reset: bool) -> None:
        """Ends the connection for both sides."""
        self.close_connection = True
        if reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()  # the last other owner of the socket
            self.connection.close()
        raise _Cut

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `LoopbackHub.calls` is the log."""
