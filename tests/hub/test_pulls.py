"""Uploads in parts, pull requests, branches and tags, through the real client."""

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import hub_env, run_client
from .conftest import IMPORTS, USERS, Client
from .server import LoopbackHub

PART = 100_000


@pytest.fixture
def parted(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", USERS, part_size=PART) as hub:
        yield hub


def _patterned(size: int) -> bytes:
    return b"".join(b"%09d\n" % line for line in range(size // 10))


def test_large_files_travel_in_parts(parted: LoopbackHub, tmp_path: Path) -> None:
    content = _patterned(3 * PART + 20)
    sha256 = hashlib.sha256(content).hexdigest()
    zeros = hashlib.sha256(bytes(3 * PART)).hexdigest()
    cut = parted.fault("PUT", f"/parts/{sha256}/2", "cut")
    again = parted.fault("POST", f"/complete_multipart/{sha256}", "status", status=503)
    corrupt = parted.fault("POST", f"/complete_multipart/{zeros}", "corrupt")
    code = """
import time
time.sleep = lambda seconds: None
def lines(size):
    return b"".join(b"%09d\\n" % line for line in range(size // 10))
def there_and_back(name, content):
    api.upload_file(path_or_fileobj=content, path_in_repo=name, repo_id="alice/parts")
    return Path(hf_hub_download("alice/parts", name)).read_bytes()
api = HfApi()
api.create_repo("alice/parts")
for name, size in (("four.bin", 300_020), ("one.bin", 100_000), ("two.bin", 200_000)):
    assert there_and_back(name, lines(size)) == lines(size)
assert there_and_back("zeros.bin", bytes(300_000)) != bytes(300_000)  # and the client says nothing
"""
    run_client(IMPORTS + code, hub_env(parted, "hf_alice", tmp_path / "home"))
    sent = [call for call in parted.calls if call.path.startswith(f"/parts/{sha256}")]
    assert [(call.path[-1], call.status) for call in sent] == [("1", 200), ("2", 0), ("2", 200), ("3", 200), ("4", 200)]
    assert (cut.hits, again.hits, corrupt.hits) == (1, 1, 1)
    parts = {call.path.split("/")[2] for call in parted.calls if call.path.startswith("/parts/")}
    assert len(parts) == 3  # what fits into one part goes in one PUT
    assert not list((parted.store.root / "uploads").iterdir())


def test_pull_requests(hub: LoopbackHub, client: Client) -> None:
    client(
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        bob = HfApi(token="hf_bob")
        here = "alice/pulls"
        api.create_repo(here)
        first = api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=here)
        # anybody may propose, in one commit with a new number or in several on an opened one
        asked = bob.upload_file(path_or_fileobj=b"w" * 50, path_in_repo="new.bin", repo_id=here, create_pr=True)
        assert (asked.pr_num, asked.pr_revision) == (1, "refs/pr/1")
        assert asked.pr_url.endswith("/alice/pulls/discussions/1")
        talk = bob.create_discussion(here, "A question")
        opened = bob.create_pull_request(here, "Two more", description="of them")
        assert (talk.num, opened.num, opened.status, opened.git_reference) == (2, 3, "draft", "refs/pr/3")
        two = [CommitOperationAdd("b.txt", b"b"), CommitOperationDelete("a.txt")]
        onto = dict(repo_id=here, revision="refs/pr/3", parent_commit=first.oid)
        made = bob.create_commit(operations=two, commit_message="more", **onto)
        late = [CommitOperationAdd("c", b"c")]
        assert status(bob.create_commit, operations=late, commit_message="late", **onto) == 412
        file = dict(path_or_fileobj=b"", path_in_repo="x", repo_id=here)
        assert status(bob.upload_file, **file) == 403
        pull = api.upload_file(**file | dict(path_in_repo="mine"), create_pr=True)  # alice's own, number 4
        assert status(bob.upload_file, **file, revision=pull.pr_revision) == 403
        assert [d.num for d in api.get_repo_discussions(here)] == [4, 3, 2, 1]
        pulls = api.get_repo_discussions(here, discussion_type="pull_request", author="bob")
        assert [d.num for d in pulls] == [3, 1]
        refs = api.list_repo_refs(here, include_pull_requests=True)
        assert {r.ref: r.target_commit for r in refs.pull_requests}["refs/pr/3"] == made.oid

        assert api.get_discussion_details(here, 3).conflicting_files == []
        api.merge_pull_request(here, 3)
        assert api.list_repo_files(here) == [".gitattributes", "b.txt"]
        assert api.get_discussion_details(here, 3).merge_commit_oid == api.model_info(here).sha
        assert api.list_repo_commits(here)[0].title == "Two more (#3)"
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo="new.bin", repo_id=here)
        assert api.get_discussion_details(here, 1).conflicting_files == ["new.bin"]
        assert status(api.merge_pull_request, here, 1) == 409
        assert bob.comment_discussion(here, 1, "oh").content == "oh"
        assert api.change_discussion_status(here, 1, "closed").new_status == "closed"
        assert [e.type for e in api.get_discussion_details(here, 1).events][-2:] == ["comment", "status-change"]
        assert status(api.merge_pull_request, here, 1) == 400
        assert status(api.get_discussion_details, here, 9) == 404
        down = snapshot_download(here, revision="refs/pr/1")
        assert (Path(down) / "new.bin").read_bytes() == b"w" * 50
        """
    )


def test_branches_and_tags(client: Client) -> None:
    client(
        """
        here = "alice/refs"
        api.create_repo(here)
        first = api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id=here).oid
        api.create_branch(here, branch="next", revision=first)
        file = dict(path_or_fileobj=b"2", path_in_repo="a.txt", repo_id=here)
        second = api.upload_file(**file, revision="next").oid
        assert (api.model_info(here).sha, api.model_info(here, revision="next").sha) == (first, second)
        assert status(api.upload_file, **file, revision="none") == 404
        assert status(api.upload_file, **file | dict(path_or_fileobj=b"3"), revision="next", parent_commit=first) == 412
        api.create_tag(here, tag="v1", revision="next", tag_message="one")
        assert api.model_info(here, revision="v1").sha == second
        assert (status(api.create_tag, here, tag="v1"), status(api.create_branch, here, branch="next")) == (409, 409)
        api.create_tag(here, tag="v1", exist_ok=True)
        api.create_branch(here, branch="next", exist_ok=True)
        api.delete_branch(here, branch="next")
        assert not api.revision_exists(here, "next") and api.model_info(here, revision=second).sha == second
        assert raised(api.delete_tag, here, tag="v2") == "RevisionNotFoundError"
        assert status(api.delete_branch, here, branch="main") == 403
        assert status(HfApi(token="hf_bob").delete_tag, here, tag="v1") == 403
        """
    )
