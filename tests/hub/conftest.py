"""One server per test module, and the real client on it."""

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import hub_env, run_client
from .server import LoopbackHub

USERS = {"hf_alice": "alice", "hf_bob": "bob", "hf_reader": "alice", "hf_fine": "alice", "hf_files": "alice"}
ROLES = {"hf_reader": "read", "hf_fine": ["repo.write", "collection.write"], "hf_files": ["repo.write"]}
ORGS = {"lab": {"alice": "write", "bob": "read"}}
IMPORTS = """
from pathlib import Path
from huggingface_hub import HfApi, ModelCard, get_hf_file_metadata, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import *
def status(call, *args, **kwargs):
    # the HTTP status of a call; 200 when it goes through
    try:
        call(*args, **kwargs)
        return 200
    except HfHubHTTPError as error:
        return error.response.status_code
def raised(call, *args, **kwargs):
    # the name of the exception of a call
    try:
        call(*args, **kwargs)
    except Exception as error:
        return type(error).__name__
"""
Client = Callable[..., str]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path_factory.mktemp("hub"), USERS, roles=ROLES, orgs=ORGS) as hub:
        yield hub
    assert not [call for call in hub.calls if call.status == 501], "the client made a call that has no route"
    # load_dataset asks the dataset viewer at a host name made from HF_ENDPOINT, and lives without the answer
    assert not [call for call in hub.strays() if "//datasets-server." not in call.path]


@pytest.fixture
def client(hub: LoopbackHub, tmp_path: Path) -> Client:
    """Runs code as alice (or with another token) with empty caches; `root` is a folder for its files."""

    def run(code: str, token: str | None = "hf_alice", **env: str) -> str:
        start = f"{IMPORTS}root = Path({str(tmp_path)!r})\napi = HfApi()\n"
        return run_client(start + textwrap.dedent(code), hub_env(hub, token, tmp_path / "home") | env)

    return run
