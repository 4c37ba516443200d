"""Faults on demand, and what the real client (huggingface_hub 2.4) makes of each.

What it retries by itself, by its source: `http_backoff` (preupload, LFS batch, PUT, completion and verify, lists, and
the commits of the Xet pipeline) tries 6 times on 408, 429, 500, 502, 503, 504, time-outs and lost connections, waiting
1, 2, 4, 8, 8 s, or one more than Retry-After says. Everything else it tries once: whoami, create_repo, info, refs, the
commit of `create_commit`, collections. A download's body is asked for again, from where it ended, after a time-out or
an early end, but not after a TCP reset nor a 500. Nothing compares what was downloaded with its hash. An LFS upload
that fails for good is a RuntimeError, with the HTTP error as its cause.
"""

import hashlib
from collections.abc import Iterator

import pytest

from .conftest import Client
from .server import LoopbackHub

# The client's own waits are written down in place of being waited for.
NO_WAIT = """
import time
waits = []
time.sleep = waits.append
def waited():
    told, waits[:] = list(waits), []
    return told
def send(repo, content, path="model.safetensors"):
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=repo)
def fetch(repo, name="model.safetensors", **kwargs):
    return Path(hf_hub_download(repo, name, **kwargs)).read_bytes()
"""


@pytest.fixture(autouse=True)
def no_fault_is_left(hub: LoopbackHub) -> Iterator[None]:
    yield
    hub.faults.clear()


def _lfs(seed: int, size: int = 3_000_000) -> tuple[bytes, str]:
    """A large file (it does not fit into the sockets' buffers) and its sha256."""
    content = bytes([seed]) * size
    return content, hashlib.sha256(content).hexdigest()


def _statuses(hub: LoopbackHub, method: str, part: str) -> list[int]:
    return [call.status for call in hub.calls if call.method == method and part in call.path]


def test_refusals_that_pass(hub: LoopbackHub, client: Client) -> None:
    _, busy = _lfs(1)
    _, down = _lfs(2)
    hub.fault("POST", "/busy/preupload/", "status", status=429, retry_after=3)
    hub.fault("PUT", busy, "status", 2, status=503)
    gone = hub.fault("PUT", down, "status", None, status=500)
    hub.fault("POST", "/busy/commit/", "status", skip=1)
    for path in ("/repos/create", "/whoami-v2", "/models/alice/busy$"):
        hub.fault("*", path, "status", skip=1 if "create" in path else 0, status=503 if "busy" in path else 429)
    client(
        NO_WAIT
        + """
api.create_repo("alice/busy")
send("alice/busy", b"\\x01" * 3_000_000)
assert waited() == [4, 1, 2]
assert raised(send, "alice/busy", b"\\x02" * 3_000_000) == "RuntimeError"  # caused by the HfHubHTTPError
assert waited() == [1, 2, 4, 8, 8]
before = api.list_repo_commits("alice/busy")
assert status(send, "alice/busy", b"small", "notes.txt") == 500  # the commit is tried once
assert [status(api.create_repo, "alice/busy2"), status(api.whoami), status(api.model_info, "alice/busy")] == [
    429, 429, 503]
assert waited() == [] and api.list_repo_commits("alice/busy") == before
send("alice/busy", b"small", "notes.txt")
"""
    )
    assert gone.hits == 6
    assert _statuses(hub, "PUT", busy) == [503, 503, 200]
    assert not hub.store.blob(down).exists()


def test_connections_that_end_in_mid_upload(hub: LoopbackHub, client: Client) -> None:
    digests = {kind: _lfs(seed)[1] for seed, kind in enumerate(("cut", "reset", "lost"), 3)}
    for kind, sha256 in digests.items():
        hub.fault("PUT", sha256, kind)
        hub.fault("POST", f"/{kind}-commit/commit/", kind)
    client(
        NO_WAIT
        + """
for seed, kind in enumerate(("cut", "reset", "lost"), 3):
    api.create_repo(f"alice/{kind}")
    send(f"alice/{kind}", bytes([seed]) * 3_000_000)
    assert waited() == [1], kind  # an LFS upload starts again by itself
    assert fetch(f"alice/{kind}") == bytes([seed]) * 3_000_000

    repo = f"alice/{kind}-commit"
    api.create_repo(repo)
    error = raised(send, repo, bytes(2_000_000), "text.txt")  # a small file's bytes are in the commit itself
    assert error in ("WriteError", "ReadError", "RemoteProtocolError"), error
    assert waited() == []  # and a commit is not tried again: it may have been made
    assert api.file_exists(repo, "text.txt") == (kind == "lost")
    send(repo, bytes(2_000_000), "text.txt")
    assert len(api.list_repo_commits(repo)) == 2  # where it had been made, the second push made none
"""
    )
    for kind, sha256 in digests.items():
        assert _statuses(hub, "PUT", sha256) == [0, 200], kind
    cut = [call for call in hub.calls if call.fault in digests]
    assert len(cut) == 6 and {call.status for call in cut} == {0}
    assert not [path for path in (hub.store.root / "blobs").iterdir() if path.is_file()]  # no half of a file


def test_what_is_stored_is_not_what_was_sent(hub: LoopbackHub, client: Client) -> None:
    _, sha256 = _lfs(7, 100_000)
    stored = hub.fault("PUT", sha256, "corrupt")
    client(
        NO_WAIT
        + f"""
content = bytes([7]) * 100_000
api.create_repo("alice/rotten")
send("alice/rotten", content)
(listed,) = api.get_paths_info("alice/rotten", ["model.safetensors"])
assert (listed.lfs.sha256, listed.size) == ({sha256!r}, 100_000)  # the Hub itself believes that all is well
assert fetch("alice/rotten") != content  # and neither upload nor download has said a word
wrong = api.verify_repo_checksums("alice/rotten")
assert [m["path"] for m in wrong.mismatches] == ["model.safetensors"]
api.create_repo("alice/other")
send("alice/other", bytes(1000) + b"end")
send("alice/other", b"text", "notes.txt")
"""
    )
    assert stored.hits == 1
    hub.damage("alice/other", "notes.txt", listed=True)
    hub.damage("alice/other", "model.safetensors")
    client(
        """
        sizes = {f.rfilename: f for f in api.model_info("alice/other", files_metadata=True).siblings}
        notes = hf_hub_download("alice/other", "notes.txt")
        assert Path(notes).read_bytes() == b"te\\x87t"
        assert sizes["notes.txt"].size == 4 and not hasattr(sizes["notes.txt"], "sha256")
        hf_hub_download("alice/other", "model.safetensors")
        wrong = api.verify_repo_checksums("alice/other")
        assert [m["path"] for m in wrong.mismatches] == ["model.safetensors"]  # of notes.txt it has a new hash
        """
    )


def test_downloads_that_go_wrong(hub: LoopbackHub, client: Client) -> None:
    content, sha256 = _lfs(8)
    setup = """
api.create_repo("alice/down")
send("alice/down", bytes([8]) * 3_000_000)
send("alice/down", b"{}", "config.json")
"""
    client(NO_WAIT + setup)
    before = len(hub.calls)
    hub.fault("GET", sha256, "corrupt")
    hub.fault("GET", sha256, "cut")
    hub.fault("GET", sha256, "reset", skip=1)  # not for the request that resumes after the cut
    hub.fault("GET", sha256, "status", skip=1, status=500)
    hub.fault("HEAD", "/down/resolve/.*config.json", "status", 2, status=500)
    client(
        NO_WAIT
        + """
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 100_000  # else it keeps what has come in chunks of 10 MiB
again = dict(force_download=True)
content = bytes([8]) * 3_000_000
wrong = fetch("alice/down")
assert len(wrong) == len(content) and wrong != content  # of the right size and under the right name in the cache
assert fetch("alice/down") == wrong  # where it stays
assert waited() == []
assert fetch("alice/down", **again) == content
assert waited() == [1]  # after the cut it asked for the rest
assert raised(fetch, "alice/down", **again) == "ReadError"
assert status(fetch, "alice/down", **again) == 500
assert waited() == [] and fetch("alice/down", **again) == content
assert fetch("alice/down", "config.json") == b"{}"
assert waited() == [1]  # the first HEAD is tried once, and only then with patience
"""
    )
    gets = [(c.status, c.fault) for c in hub.calls[before:] if c.method == "GET" and sha256 in c.path]
    assert gets == [(200, "corrupt"), (200, "cut"), (206, ""), (200, "reset"), (500, "status"), (200, "")]
    resumed = next(c for c in hub.calls[before:] if c.status == 206)
    assert 0 < resumed.sent < len(content)


def test_slow_answers(hub: LoopbackHub, client: Client) -> None:
    hub.fault("GET", "/slow/resolve/", "slow", seconds=1.4)
    hub.fault("GET", "/api/models/alice/slow$", "slow", seconds=0.3)
    hub.fault("HEAD", "/slow/resolve/", "slow", seconds=1.4)
    client(
        """
        import time
        api.create_repo("alice/slow")
        start = time.monotonic()
        api.model_info("alice/slow")  # an API call waits for its answer
        assert time.monotonic() - start >= 0.3
        hf_hub_download("alice/slow", ".gitattributes")  # HEAD and GET are given up after a second and asked again
        """,
        HF_HUB_DOWNLOAD_TIMEOUT="1",
        HF_HUB_ETAG_TIMEOUT="1",
    )
    for method in ("HEAD", "GET"):
        assert _statuses(hub, method, "/slow/resolve/") == [200, 200]


def test_plans(hub: LoopbackHub) -> None:
    with pytest.raises(ValueError, match="a fault is one of"):
        hub.fault("GET", "/", "explode")
    once = hub.fault("GET", "/none/[0-9]", "status", skip=1)
    always = hub.fault("*", "/none/", "slow", None, seconds=0)
    met = [hub.faults.take(method, "/none/1") for method in ("GET", "PUT", "GET", "GET")]
    assert met == [always, always, once, always] and (once.hits, always.hits) == (1, 3)
    hub.faults.clear()
    assert hub.faults.take("GET", "/none/1") is None
