"""A push over the loopback Hub: one commit per repo, in order, with receipts; and all that can go wrong on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hub import hub_env, run_client
from tests.hub.server import LoopbackHub

USERS = {"hf_tester": "tester", "hf_other": "other", "hf_reader": "tester", "hf_files": "tester", "hf_none": "tester"}
ROLES = {"hf_reader": "read", "hf_files": ["repo.write"], "hf_none": ["discussion.write"]}
ORGS = {"lab": {"tester": "write", "other": "read"}}
PRELUDE = """
import json, os, sys, time
from pathlib import Path
from huggingface_hub import HfApi, hf_hub_download
from hfsd import downloads, hub_write, sending
from hfsd.errors import HfsdError
from hfsd.rundir import new_folder
from hfsd.sending import Asked, Batch
from hfsd.staging import Repo

waits, api, root = [], HfApi(), Path(%r)
time.sleep = waits.append  # waits are written down in place of being waited for
REPOS = [Repo("dataset", "dataset", "rows"), Repo("pruned", "model", "tiny"), Repo("space", "space", "show")]
FILES = {
    "dataset": {"rows.jsonl": b'{"id": 1}\\n'},
    "pruned": {"model.safetensors": bytes([7]) * 3_000_000, "config.json": b"{}", "adapter/notes.txt": b"small"},
    "space": {"app.py": b"print()\\n"},
}
TAGS = "tags: [hfsd]\\n"
CARD = {"space": "sdk: gradio\\ncolorFrom: blue\\ncolorTo: green\\n"}


def stage(repo, out, places):
    with new_folder(out / repo.name) as target:
        (target / "README.md").write_text(f"---\\n{CARD.get(repo.kind, TAGS)}---\\n# {repo.name}\\n")
        for name, content in FILES[repo.key].items():
            (target / name).parent.mkdir(exist_ok=True)
            (target / name).write_bytes(content)
        if repo.kind == "space":
            (target / "family.json").write_text(json.dumps(places, sort_keys=True))
    return out / repo.name


def push(to="tester", repos=REPOS, out="push", title="tiny", faults=(), **asked):
    reading = [("space", "see it"), ("pruned", "the model"), ("dataset", "the rows")]
    batch = Batch(to, repos, stage, root / out / to, "hfsd run tiny", title, "A family", reading)
    return sending.push(batch, Asked(**asked), faults)


def refused(**asked):
    try:
        push(**asked)
    except HfsdError as error:
        return str(error)
    raise AssertionError("it was not refused")


def commits(repo, kind="model", **kwargs):
    return [c.title for c in api.list_repo_commits(repo, repo_type=kind, **kwargs)]
"""
Client = Callable[..., str]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", USERS, roles=ROLES, orgs=ORGS) as hub:
        yield hub
    assert not [call for call in hub.calls if call.status == 501], "the client made a call that has no route"
    assert not hub.strays()


@pytest.fixture
def client(hub: LoopbackHub, tmp_path: Path) -> Client:
    """Runs code as the tester, or with another token; `root` is a folder that stays between two runs of a test."""

    def run(code: str, token: str | None = "hf_tester") -> str:
        return run_client(PRELUDE % str(tmp_path / "work") + code, hub_env(hub, token, tmp_path / "home"))

    return run


def _commits(hub: LoopbackHub) -> list[str]:
    return [call.path for call in hub.calls if call.method == "POST" and "/commit/" in call.path]


def test_each_repo_in_one_commit_in_order_and_nothing_twice(hub: LoopbackHub, client: Client) -> None:
    client(
        """
plan = push(dry_run=True)
assert plan.receipts == [] and [(l.kind, l.state, l.visibility) for l in plan.plan] == [
    ("dataset", "new", "public"), ("model", "new", "public"), ("space", "new", "public")]
assert plan.plan[1].files == 4 and plan.plan[1].bytes == plan.plan[1].sends > 3_000_000
assert (root / "push/tester/tiny/model.safetensors").stat().st_size == 3_000_000
assert sending.summary(plan.plan).startswith("3 repos to send, 3 MB: 0.0 s to 0.6 s at 100 MB to 5 MB per second")
assert not list(api.list_models(author="tester")) and not list(api.list_datasets(author="tester"))
done = push(private=True)
assert [r.kind for r in done.receipts] == ["dataset", "model", "space", "collection"]
assert commits("tester/tiny") == ["hfsd run tiny: pruned", "initial commit"]
kept = json.loads((root / "push/tester/receipts.json").read_text())
assert [r["repo"] for r in kept] == [r.repo for r in done.receipts]
there = api.model_info("tester/tiny", files_metadata=True)
assert there.private and there.sha == done.receipts[1].commit
assert {s.rfilename for s in there.siblings} == {*done.receipts[1].files, ".gitattributes"}
places = json.loads(Path(hf_hub_download("tester/show", "family.json", repo_type="space")).read_text())
assert places["pruned"] == {"repo": "tester/tiny", "revision": there.sha}
found = api.get_collection(done.receipts[3].repo)
assert [i.item_id for i in found.items] == ["tester/show", "tester/tiny", "tester/rows"] and found.private
assert (found.title, found.items[1].note) == ("tiny", "the model")
again = push(private=True)
assert [l.state for l in again.plan] == ["unchanged"] * 3 and again.receipts == done.receipts
assert sending.summary(again.plan) == "3 repos: nothing to send"
del FILES["pruned"]["adapter/notes.txt"]
FILES["pruned"]["config.json"] = b'{"a": 1}'
assert [(l.state, l.sends) for l in push(dry_run=True, only=("models",)).plan] == [("changed", 8)]
done = push(only=("models",))  # they are private by now, and stay so
assert {f for f in api.list_repo_files("tester/tiny")} == {*done.receipts[0].files, ".gitattributes"}
assert len(commits("tester/tiny")) == 3 and len(commits("tester/show", "space")) == 2
# a reader of the family has added to the collection, and taken from it
api.create_repo("tester/friend")
slug = done.receipts[-1].repo
api.delete_collection_item(slug, api.get_collection(slug).items[0].item_object_id)
friend = api.add_collection_item(slug, "tester/friend", "model").items[-1]
api.update_collection_item(slug, friend.item_object_id, position=0)
assert push().receipts[2].commit and len(commits("tester/show", "space")) == 3  # it names the new commit
names = [i.item_id for i in api.get_collection(slug).items]
assert names == ["tester/show", "tester/tiny", "tester/rows", "tester/friend"] and api.get_collection(slug).private
assert len(list(api.list_collections(owner="tester"))) == 1
"""
    )
    first = [["tester", name] for name in ("rows", "tiny", "show")]
    assert [path.split("/")[3:5] for path in _commits(hub)] == [*first, first[1], first[2]]


def test_a_branch_and_pull_requests_leave_main_alone(hub: LoopbackHub, client: Client) -> None:
    client(
        """
assert [r.revision for r in push(revision="next").receipts] == ["next"] * 3
assert api.list_repo_files("tester/tiny") == [".gitattributes"]
assert commits("tester/tiny", revision="next")[1:] == ["initial commit"]
assert not list(api.list_collections(owner="tester"))
assert [l.state for l in push(revision="next").plan] == ["unchanged"] * 3
FILES["dataset"]["more.txt"] = b"more"
opened = push(create_pr=True)
assert [r.revision for r in opened.receipts] == ["refs/pr/1"] * 3 and opened.receipts[1].url.endswith("/discussions/1")
assert api.list_repo_files("tester/rows", repo_type="dataset") == [".gitattributes"]
again = push(create_pr=True)
assert [l.state for l in again.plan] == ["proposed"] * 3 and again.receipts == opened.receipts
(root / "push/tester/receipts.json").unlink()  # as if the push had been killed before it was written
assert push(create_pr=True).receipts == opened.receipts and len(list(api.get_repo_discussions("tester/tiny"))) == 1
for repo, kind in (("tester/rows", "dataset"), ("tester/tiny", "model")):
    api.merge_pull_request(repo, 1, repo_type=kind)
assert [l.state for l in push(create_pr=True, only=("models", "dataset")).plan] == ["unchanged"] * 2
assert "onto main, and --revision" in refused(create_pr=True, revision="next")
"""
    )


def test_a_repo_that_somebody_changed_is_refused_and_then_forced(client: Client) -> None:
    client(
        """
push()
api.upload_file(path_or_fileobj=b"mine", path_in_repo="mine.txt", repo_id="tester/tiny", commit_message="by hand")
head = api.model_info("tester/tiny").sha
FILES["dataset"]["rows.jsonl"] = b'{"id": 2}\\n'
told = refused()
assert told.startswith(f"tester/tiny has changed since the last push: commit {head[:12]} by tester at ")
assert "'by hand'; keep it with --revision BRANCH, or overwrite it with --force" in told and "\\n" not in told
assert len(commits("tester/rows", "dataset")) == 2  # nothing was sent, not even what is ours
push(revision="kept")
push(force=True)
assert "mine.txt" not in api.list_repo_files("tester/tiny") and commits("tester/tiny")[1] == "by hand"
api.create_repo("tester/alien")
api.upload_file(path_or_fileobj=b"x", path_in_repo="x", repo_id="tester/alien", commit_message="alien")
alien = [Repo("pruned", "model", "alien")]
assert "tester/alien holds what no push of this folder has sent" in refused(repos=alien, out="other")
assert refused(private=True).count("is there and public") == 3
# between the look and the commit
look = hub_write.state
def late(repo, *words):
    found = look(repo, *words)
    if repo == "tester/tiny":
        hub_write.state = look
        api.upload_file(path_or_fileobj=b"late", path_in_repo="late.txt", repo_id=repo)
    return found
hub_write.state = late
FILES["pruned"]["config.json"] = b'{"b": 2}'
assert "has changed while this push went on" in refused()
"""
    )


def test_a_push_that_is_killed_goes_on_where_it_was(hub: LoopbackHub, client: Client) -> None:
    killed = """
import contextlib
commit = hub_write.commit
def die(folder, files, repo, *words):
    if {before} and repo == {repo!r}:
        os._exit(9)
    made = commit(folder, files, repo, *words)
    if repo == {repo!r}:
        os._exit(9)
    return made
hub_write.commit = die
push()
"""
    with pytest.raises(AssertionError, match=r"client failed \(9\)"):
        client(killed.format(before=True, repo="tester/tiny"))
    assert len(_commits(hub)) == 1
    with pytest.raises(AssertionError, match=r"client failed \(9\)"):
        client(killed.format(before=False, repo="tester/tiny"))  # committed, and no receipt written
    assert len(_commits(hub)) == 2
    client(
        """
kept = [r["repo"] for r in json.loads((root / "push/tester/receipts.json").read_text())]
assert kept == ["tester/rows"]
assert [l.state for l in push().plan] == ["unchanged", "unchanged", "new"]
"""
    )
    assert len(_commits(hub)) == 3


def test_faults_that_pass_are_waited_for_and_those_that_stay_are_told(hub: LoopbackHub, client: Client) -> None:
    hub.fault("*", "/whoami-v2", "status", status=429, retry_after=7)
    hub.fault("POST", "/repos/create", "status", status=429, retry_after=11)
    hub.fault("POST", "/rows/commit/", "status", status=500)
    hub.fault("POST", "/tiny/commit/", "status", status=429, retry_after=13)
    hub.fault("PUT", "/blobs/", "cut")
    hub.fault("GET", "/api/models/tester/tiny/revision", "reset", skip=1)
    lost = hub.fault("POST", "/show/commit/", "lost")
    hub.fault("POST", "/api/collections$", "status", status=503)
    hub.fault("POST", "/api/collections/.*/items$", "lost")
    client(
        """
done = push()
assert [len(commits(r.repo, r.kind)) for r in done.receipts[:3]] == [2, 2, 2]
assert {7, 11, 13} <= set(waits) and len(done.receipts) == 4, waits
found = [i.item_id for i in api.get_collection(done.receipts[3].repo).items]
assert found == ["tester/show", "tester/tiny", "tester/rows"]
"""
    )
    assert lost.hits == 1 and len([p for p in _commits(hub) if "/show/" in p]) == 1  # looked for, not sent again
    hub.faults.clear()
    hub.fault("PUT", "/blobs/", "status", None, status=500)
    hub.fault("POST", "/rows/commit/", "status", None, status=503)
    hub.fault("POST", "/alone/commit/", "lost", None)
    client(
        """
FILES["pruned"]["model.safetensors"] = b"new" * 1000
told = refused(only=("models",))
assert told.startswith("model repo tester/tiny: the Hub answered 500: Fault on demand: 500") and "push again" in told
FILES["dataset"]["rows.jsonl"] = b"new"
assert "dataset repo tester/rows: the Hub answered 503" in refused(only=("dataset",))
assert len(commits("tester/rows", "dataset")) == 2
pulled = push(repos=[Repo("dataset", "model", "alone")], create_pr=True)  # the answer to the pull request was lost
assert pulled.receipts[0].revision == "refs/pr/1" and len(list(api.get_repo_discussions("tester/alone"))) == 1
"""
    )


def test_what_the_hub_damages_is_found(hub: LoopbackHub, client: Client) -> None:
    hub.fault("PUT", "/blobs/", "corrupt")
    client(
        """
told = refused(verify=True)
assert "tester/tiny at " in told and "model.safetensors does not come down as it was sent" in told
"""
    )
    hub.damage("tester/tiny", "config.json", listed=True)
    client(
        """
assert [l.state for l in push(dry_run=True).plan] == ["unchanged", "changed", "new"]
push()
assert Path(hf_hub_download("tester/tiny", "config.json")).read_bytes() == b"{}"
"""
    )


def test_all_faults_are_told_at_once_before_the_first_byte(hub: LoopbackHub, client: Client) -> None:
    client(
        """
FILES["dataset"] = {
    "a.txt": b"x" * 9000 + b" hf_" + b"Ab1" * 12,
    "b.md": b"key sk-proj-" + b"a1B2c3D4e5" * 4,
    "c.jsonl": b'"AKIA' + b"ABCDEFGH12345678" + b'"',
    "d.pem": b"-----BEGIN RSA " + b"PRIVATE KEY-----\\n",
    "e.txt": b"hf_reader",
    "f.bin": b"\\0hf_" + b"Ab1" * 12,
    "g.txt": b"task-force risk-averse-and-long-words",
}
told = refused(faults=["train/x is not finished"]).splitlines()
assert told[0] == "train/x is not finished"
assert told[1] == "the token at hand may only read; make one that may write on your page of access tokens"
looks = [line.split(" holds what looks like ")[1].split(";")[0] for line in told[2:]]
kinds = ["a Hugging Face token", "a secret key (sk-...)", "an AWS access key", "a private key", "the token at hand"]
assert looks == kinds, told
assert not any("Ab1" in line for line in told)
bad = [Repo("pruned", "model", "a--b"), Repo("dataset", "dataset", "x"), Repo("space", "space", "x")]
told = refused(repos=bad)
assert "tester/a--b is no name that the Hub takes" in told and "two repos would be called tester/x" in told
assert refused(only=("model",)).startswith("--only model: of models, dataset, space")


def as_(token, **asked):
    os.environ["HF_TOKEN"] = token
    return refused(**asked)


FILES["dataset"] = {"rows.jsonl": b"{}"}
told = as_("hf_none", to="lab").splitlines()
assert told[0] == "--to lab: the fine-grained token at hand lacks the permission repo.write there"
assert told[1] == "--to lab: the fine-grained token at hand lacks the permission collection.write there"
assert "other has the role 'read' there" in as_("hf_other", to="lab")
assert "--to tester: other is no member of it; the token at hand may write to other" in as_("hf_other")
assert as_("hf_wrong").startswith("the Hub does not know the token at hand")
assert as_("").startswith("publish needs a token")
assert "the Space names tester/tiny, which was not pushed yet" in as_("hf_tester", only=("space",))
assert "lacks the permission collection.write" in as_("hf_files")
assert len(push(title=None).receipts) == 3
""",
        token="hf_reader",
    )
    assert len(_commits(hub)) == 3
