"""A Hub on 127.0.0.1 that speaks to the real `huggingface_hub` client and keeps everything in one folder.

    with LoopbackHub(tmp_path) as hub:
        run_client("from huggingface_hub import HfApi; ...", hub_env(hub, "hf_loopback", tmp_path / "home"))

    python -m tests.hub.server --root DIR --port 8765

Left out: Xet (set HF_HUB_DISABLE_XET=1), organizations, discussions, gated repositories, running Spaces, paging,
.gitignore rules, multi-part LFS. A call without a route answers 501 and names itself.
"""

import argparse
import json
import sys
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from . import collection_routes, routes, uploads  # noqa: F401  (imported to register their routes)
from .errors import HubError
from .messages import Request, Response, dispatch
from .store import Store

DEFAULT_USERS = {"hf_loopback": "tester"}


class Call(NamedTuple):
    """One answered request. `path` is the target as sent, query included; `sent` the bytes of a file in the answer."""

    method: str
    path: str
    status: int
    sent: int = 0


class LoopbackHub:
    """The server and its state; a context manager. A new one on the same `root` continues where the last stopped.

    Args:
        root: folder for blobs, commits and collections; created when missing.
        users: token -> account name. Each account writes to its own namespace only.
        port: 0 picks a free one.
    """

    def __init__(self, root: Path, users: dict[str, str] | None = None, port: int = 0):
        self.users = dict(DEFAULT_USERS if users is None else users)
        self.store = Store(root)
        self.calls: list[Call] = []
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.port: int = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def strays(self) -> list[Call]:
        """Requests that a client of `hub_env` meant for other hosts; all were refused."""
        return [call for call in self.calls if call.method == "CONNECT" or not call.path.startswith("/")]

    def blob_url(self, sha256: str) -> str:
        # Another host name on purpose: within one host the client's HEAD follows the redirect from resolve/ to the
        # blob and so loses X-Repo-Commit. The real Hub redirects to its CDN.
        return f"http://localhost:{self.port}/blobs/{sha256}"

    def __enter__(self) -> "LoopbackHub":
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def serve_forever(self) -> None:
        self._server.serve_forever()


class _Server(ThreadingHTTPServer):
    hub: LoopbackHub
    daemon_threads = True
    request_queue_size = 128  # the default of 5 makes a burst of uploads wait for the kernel's retry

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client killed in mid-transfer is no news
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keep-alive; every response states its length
    server: _Server
    disable_nagle_algorithm = True  # headers and body are two writes: without this each answer may wait 40 ms
    server_version = "LoopbackHub"

    def _answer(self) -> None:
        hub = self.server.hub
        try:
            request = self._request(hub)
            response = dispatch(request)
        except HubError as error:
            self._discard(error.status)
            body = json.dumps(error.body).encode()
            response = Response(error.status, body, {"Content-Type": "application/json", **error.headers})
        except Exception as error:  # a bug of ours: 500 makes the client retry, 501 shows it at once
            traceback.print_exc()
            self.close_connection = True
            response = Response(501, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode())
        sent = 0 if self.command == "HEAD" else response.length
        hub.calls.append(Call(self.command, self.path, response.status, sent))
        self._send(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

    def do_CONNECT(self) -> None:
        """`hub_env` names this server as proxy: what the client asks of the outside world ends here, on record."""
        hub = self.server.hub
        hub.calls.append(Call("CONNECT", self.path, 403))
        self.close_connection = True
        self._send(Response(403))

    def _request(self, hub: LoopbackHub) -> Request:
        parts = urlsplit(self.path)
        if parts.scheme:
            raise HubError(403, f"No way out of loopback: {self.path}")
        headers = {name.lower(): value for name, value in self.headers.items()}
        streamed = self.command == "PUT"
        if "chunked" in headers.get("transfer-encoding", ""):
            raise HubError(411, "Send a Content-Length")
        body = b"" if streamed else self.rfile.read(int(headers.get("content-length", 0)))
        user = self._user(hub, headers.get("authorization"))
        stream = self.rfile if streamed else None
        return Request(hub, self.command, parts.path, parse_qs(parts.query), headers, user, stream, body)  # type: ignore[arg-type]

    def _user(self, hub: LoopbackHub, authorization: str | None) -> str | None:
        if authorization is None:
            return None
        token = authorization.removeprefix("Bearer ")
        if token not in hub.users:
            # on reads too, as on the Hub: a wrong token is worse than none
            raise HubError(401, "Invalid credentials in Authorization header")
        return hub.users[token]

    def _discard(self, status: int) -> None:
        """A refused upload leaves its body in the socket, where it would be read as the next request."""
        if self.command == "PUT" or status == 411:
            self.close_connection = True

    def _send(self, response: Response) -> None:
        length = response.length if response.file else len(response.body)
        self.send_response(response.status)
        for name, value in {**response.headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if response.file is None:
            self.wfile.write(response.body)
        elif length:
            with response.file.open("rb") as file:
                self.connection.sendfile(file, response.start, length)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: `LoopbackHub.calls` is the log."""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.hub.server", description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, required=True, help="folder that holds the repositories")
    parser.add_argument("--port", type=int, default=0, help="default: a free port")
    args = parser.parse_args(argv)
    hub = LoopbackHub(args.root, port=args.port)
    token = next(iter(hub.users))
    print(f"export HF_ENDPOINT={hub.endpoint} HF_TOKEN={token} HF_HUB_DISABLE_XET=1", flush=True)
    try:
        hub.serve_forever()
    except KeyboardInterrupt:
        sys.exit(0)


if __name__ == "__main__":
    main()
