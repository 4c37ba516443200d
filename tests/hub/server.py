"""A Hub on 127.0.0.1 that speaks to the real `huggingface_hub` client and keeps everything in one folder.

    with LoopbackHub(tmp_path) as hub:
        run_client("from huggingface_hub import HfApi; ...", hub_env(hub, "hf_loopback", tmp_path / "home"))

    python -m tests.hub.server --root DIR --port 8765

Left out: Xet (set HF_HUB_DISABLE_XET=1), running Spaces and their settings, moving and duplicating repositories, likes,
.gitignore rules. A call without a route answers 501 and names itself.
"""

import argparse
import sys
import threading
from collections.abc import Mapping
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

from .accounts import Accounts, Role
from .faults import Fault, Plan, damage
from .handler import Handler
from .store import Store

DEFAULT_USERS = {"hf_loopback": "tester"}


class Call(NamedTuple):
    """One answered request.

    `path` is the target as sent, query included; `sent` the bytes of a file in the answer; `fault` the kind of fault
    that it met. `status` is 0 where the connection was cut before an answer.
    """

    method: str
    path: str
    status: int
    sent: int = 0
    fault: str = ""


class LoopbackHub:
    """The server and its state; a context manager. A new one on the same `root` continues where the last stopped.

    Args:
        root: folder for blobs, commits and collections; created when missing.
        users: token -> account name. Each account writes to its own namespace and its organizations' only.
        port: 0 picks a free one.
        roles: token -> "write" (the default), "read", or the permissions of a fine-grained token (`["repo.write"]`).
        orgs: organization -> account -> "admin", "write", "contributor" or "read".
        part_size: LFS objects of more bytes are sent in parts of this size; None: each in one PUT.
        page_size: entries of a list (repositories, files, commits, collections) in one answer.
    """

    def __init__(
        self,
        root: Path,
        users: Mapping[str, str] | None = None,
        port: int = 0,
        *,
        roles: Mapping[str, Role] | None = None,
        orgs: Mapping[str, Mapping[str, str]] | None = None,
        part_size: int | None = None,
        page_size: int = 1000,
    ):
        self.accounts = Accounts(DEFAULT_USERS if users is None else users, roles or {}, orgs or {})
        self.users = self.accounts.users
        self.store = Store(root, self.accounts.may_read)
        self.part_size, self.page_size = part_size, page_size
        self.calls: list[Call] = []
        self.faults = Plan()
        self._server = _Server(("127.0.0.1", port), Handler)
        self._server.hub = self
        self.port: int = self._server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def fault(
        self,
        method: str,
        path: str,
        kind: str,
        times: int | None = 1,
        *,
        skip: int = 0,
        status: int = 500,
        retry_after: int | None = None,
        seconds: float = 1,
    ) -> Fault:
        """Makes requests go wrong from now on.

            hub.fault("PUT", "/blobs/", "cut")  # the next LFS upload dies halfway
            hub.fault("POST", "/commit/", "lost")  # committed, but the client never hears of it
            hub.fault("*", "/api/", "status", times=2, status=429, retry_after=3)  # two calls are told to wait
            hub.fault("GET", "/blobs/", "corrupt", times=None)  # every LFS download is damaged

        Targets: LFS files travel by `/blobs/SHA256` (up in parts: `/parts/SHA256/N`, then POST
        `/api/complete_multipart/SHA256`), small ones up inside `/commit/`, down by `/resolve/`.

        Args:
            method: HTTP method, or "*".
            path: regular expression, searched in the target as sent (percent-encoded, with its query).
            kind: what happens.
                "status": the answer is `status`, and nothing is done. The body is read first.
                "slow": `seconds` pass before anything is done.
                "cut": the connection is closed halfway. With a body in the request: after half of it was read, and
                    nothing is done. Without: after half of the answer's body was sent.
                "reset": the same with a TCP reset, which clients tell from an orderly end.
                "lost": everything is done, and the connection closed in place of an answer.
                "corrupt": one byte is changed. On an upload of a blob: what is stored, under the name of what was
                    sent. On anything else: what is answered, under its right length and ETag.
            times: how many requests meet it; None: all.
            skip: how many that fit are let through before.
            status: of "status".
            retry_after: seconds in a Retry-After header of "status".
            seconds: of "slow".

        Returns:
            The fault; `.hits` counts the requests that met it. `hub.calls` has them too, with `.fault`.
            `hub.faults.clear()` ends all faults.
        """
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return self.faults.add(Fault(method, path, kind, times, skip, status, headers, seconds))

    def damage(self, repo_id: str, *paths: str, kind: str = "models", listed: bool = False) -> None:
        """Changes a byte of files on main that were stored well; equal files of other repositories change with them.

        Args:
            paths: files to change.
            kind: "models", "datasets" or "spaces".
            listed: the Hub's own lists and ETags tell the hashes of what it has now, not of what was sent. The commit
                keeps its id.
        """
        repo = self.store.repo(kind, repo_id, repo_id.split("/")[0])
        files = self.store.resolve(repo, "main").files
        if listed:
            self.store.replace(repo, "main", paths)
        else:
            damage(self.store.blob(files[path].sha256) for path in paths)

    def record(self, method: str, path: str, status: int, sent: int, fault: str) -> None:
        self.calls.append(Call(method, path, status, sent, fault))

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
