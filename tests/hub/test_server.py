"""The loopback Hub, seen through the real client. Each test uses repositories of its own on one shared server."""

import hashlib
import re
import socket
import subprocess
import sys
from pathlib import Path

from . import hub_env, run_client
from .conftest import Client
from .server import LoopbackHub
from .store import Entry, git_oid, tree_oids


def test_upload_then_download(hub: LoopbackHub, client: Client) -> None:
    before = len(hub.calls)
    out = client(
        r"""
        files = {"README.md": b"---\nlicense: mit\n---\n", "empty": b"", "deep/er/ä b#c%20?.txt": b"text",
                 "model.safetensors": bytes(range(256)) * 20_000, "tool": b"\0binary"}
        for name, content in files.items():
            path = root / "up" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        assert api.whoami()["name"] == "alice"
        url = api.create_repo("alice/files")
        assert (url.repo_id, api.create_repo("alice/files", exist_ok=True)) == ("alice/files", url)
        first = api.upload_folder(repo_id="alice/files", folder_path=root / "up", commit_message="all of it")
        again = api.upload_folder(repo_id="alice/files", folder_path=root / "up")
        assert again.oid == first.oid
        assert [c.title for c in api.list_repo_commits("alice/files")] == ["all of it", "initial commit"]

        down = Path(snapshot_download("alice/files"))
        assert {str(p.relative_to(down)) for p in down.rglob("*") if p.is_file()} == {*files, ".gitattributes"}
        assert all((down / name).read_bytes() == content for name, content in files.items())
        info = {f.rfilename: f for f in api.model_info("alice/files", files_metadata=True).siblings}
        assert {name for name, f in info.items() if f.lfs} == {"model.safetensors", "tool"}
        seen = get_hf_file_metadata(hf_hub_url("alice/files", "model.safetensors"))
        assert (seen.commit_hash, seen.size) == (first.oid, 5_120_000)
        assert seen.etag == info["model.safetensors"].lfs.sha256

        api.create_tag("alice/files", tag="v1")
        api.create_branch("alice/files", branch="feature/x")
        api.delete_folder("deep", "alice/files")
        gone = api.delete_file("empty", "alice/files", parent_commit=api.model_info("alice/files").sha)
        assert not api.file_exists("alice/files", "deep/er/ä b#c%20?.txt")
        assert api.file_exists("alice/files", "empty", revision="v1")
        assert api.file_exists("alice/files", "empty", revision="feature/x")
        assert api.file_exists("alice/files", "empty", revision=first.oid)
        paths = api.get_paths_info("alice/files", ["tool", "deep", "none"], revision="v1", expand=True)
        assert [(p.path, p.last_commit.title) for p in paths] == [("tool", "all of it"), ("deep", "all of it")]
        tree = api.list_repo_tree("alice/files", "deep", revision="v1", recursive=True)
        assert [p.path for p in tree] == ["deep/er", "deep/er/ä b#c%20?.txt"]
        refs = api.list_repo_refs("alice/files")
        assert {r.name: r.target_commit for r in refs.branches} == {"main": gone.oid, "feature/x": first.oid}
        assert [r.ref for r in refs.tags] == ["refs/tags/v1"]
        api.delete_tag("alice/files", tag="v1")
        assert not api.revision_exists("alice/files", "v1")

        pull = api.upload_file(path_or_fileobj=b"1", path_in_repo="new", repo_id="alice/files", create_pr=True)
        assert pull.pr_revision == "refs/pr/1" and not api.file_exists("alice/files", "new")
        assert hf_hub_download("alice/files", "new", revision="refs/pr/1")
        print(first.oid)
        """
    )
    assert re.fullmatch(r"[0-9a-f]{40}\n", out)
    uploads = [call for call in hub.calls[before:] if call.method == "PUT"]
    assert [call.status for call in uploads] == [200, 200]


def test_writes_need_the_right_token(client: Client) -> None:
    client(
        """
        api.create_repo("alice/guarded")
        api.create_repo("alice/secret", private=True)
        file = dict(path_or_fileobj=b"x", path_in_repo="x", repo_id="alice/guarded")
        def attempts(api):
            return [status(api.upload_file, **file), status(api.create_repo, "alice/other"),
                    status(api.delete_repo, "alice/guarded"), status(api.model_info, "alice/guarded"),
                    status(api.model_info, "alice/secret"), status(lambda: list(api.list_models(author="alice")))]
        def listed(api):
            return "alice/secret" in [m.id for m in api.list_models(author="alice")]
        nobody, bob, wrong = HfApi(token=False), HfApi(token="hf_bob"), HfApi(token="hf_wrong")
        assert attempts(nobody) == [401, 401, 401, 200, 404, 200]
        assert attempts(bob) == [403, 403, 403, 200, 404, 200]
        assert attempts(wrong) == [401] * 6
        assert (listed(api), listed(bob), listed(nobody)) == (True, False, False)
        """
    )


def test_stale_parent_is_refused(client: Client) -> None:
    client(
        """
        from huggingface_hub import CommitOperationAdd
        from huggingface_hub.errors import HfHubHTTPError
        api.create_repo("alice/race")
        seen = api.model_info("alice/race").sha
        mine = [CommitOperationAdd("mine.txt", b"mine")]
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo="theirs.txt", repo_id="alice/race")
        head = api.model_info("alice/race").sha
        try:
            api.create_commit("alice/race", mine, commit_message="late", parent_commit=seen)
            raise SystemExit("accepted")
        except HfHubHTTPError as error:
            assert error.response.status_code == 412 and "commit has happened since" in str(error), error
        assert api.model_info("alice/race").sha == head
        assert api.create_commit("alice/race", mine, commit_message="now", parent_commit=head[:7]).oid != head
        """
    )


def test_each_kind_of_missing(client: Client) -> None:
    client(
        """
        from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
        from huggingface_hub.errors import *
        def raises(kind, call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except kind as error:
                assert type(error) is kind, (type(error), kind)
                return error
            raise SystemExit(f"{call.__name__}{args} did not raise {kind.__name__}")
        api.create_repo("alice/here", repo_type="dataset")
        here = dict(repo_id="alice/here", repo_type="dataset")
        for name in ("alice/nowhere", "alice/here", "gpt2"):  # "here" is a data set, not a model
            raises(RepositoryNotFoundError, api.model_info, name)
            raises(RepositoryNotFoundError, snapshot_download, name)
            raises(RepositoryNotFoundError, api.hf_hub_download, name, "config.json")
        raises(RepositoryNotFoundError, api.delete_repo, "alice/nowhere")
        raises(RevisionNotFoundError, api.dataset_info, "alice/here", revision="v9")
        raises(RevisionNotFoundError, snapshot_download, **here, revision="0" * 40)
        raises(RemoteEntryNotFoundError, hf_hub_download, **here, filename="none.txt")
        raises(RemoteEntryNotFoundError, lambda: list(api.list_repo_tree(**here, path_in_repo="none")))
        raises(RemoteEntryNotFoundError, api.delete_file, "none.txt", **here)
        assert try_to_load_from_cache(**here, filename="none.txt") is _CACHED_NO_EXIST
        api.delete_repo(**here)
        raises(RepositoryNotFoundError, api.dataset_info, "alice/here")
        """
    )


def test_ranges(client: Client) -> None:
    client(
        """
        from huggingface_hub import HfFileSystem, get_session
        content = bytes(range(256)) * 8192
        api.create_repo("alice/ranges")
        for name in ("large.bin", "small.txt"):  # by redirect to the blob, and direct
            data = content if name == "large.bin" else b"0123456789"
            api.upload_file(path_or_fileobj=data, path_in_repo=name, repo_id="alice/ranges")
            def get(range, name=name):
                return get_session().get(hf_hub_url("alice/ranges", name), headers={"Range": range})
            part = get("bytes=3-6")
            assert (part.status_code, part.content) == (206, data[3:7])
            assert part.headers["content-range"] == f"bytes 3-6/{len(data)}"
            assert get("bytes=4-").content == data[4:]
            assert get("bytes=-4").content == data[-4:]
            assert get(f"bytes=2-{len(data) * 2}").content == data[2:]
            assert get(f"bytes={len(data)}-").status_code == 416
        with HfFileSystem().open("alice/ranges/large.bin", block_size=2**16) as file:
            file.seek(1_000_001)
            assert file.read(1000) == content[1_000_001:1_001_001]
        """
    )


def test_concurrent_uploads(client: Client) -> None:
    client(
        """
        import os
        from concurrent.futures import ThreadPoolExecutor
        def publish(name):
            folder = root / name
            folder.mkdir()
            for i in range(6):
                (folder / f"{i}.bin").write_bytes(os.urandom(300_000))
                (folder / f"{i}.txt").write_text(f"{name} {i}")
            api.create_repo(f"alice/{name}")
            api.upload_folder(repo_id=f"alice/{name}", folder_path=folder)
        def append(i):  # commits to one branch queue up, none is lost
            api.upload_file(path_or_fileobj=b"%d" % i, path_in_repo=f"extra/{i}", repo_id="alice/left")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(publish, ["left", "right"]))
            list(pool.map(append, range(12)))
        for name in ("left", "right"):
            down = Path(snapshot_download(f"alice/{name}"))
            assert all((down / p.name).read_bytes() == p.read_bytes() for p in (root / name).iterdir())
        assert len(list(api.list_repo_tree("alice/left", "extra"))) == 12
        assert len(api.list_repo_commits("alice/left")) == 14
        """
    )


def test_cards_through_the_client(client: Client) -> None:
    client(
        r"""
        import warnings
        from huggingface_hub import EvalResult, ModelCardData, SpaceCard
        warnings.simplefilter("error")
        def refused(text, call, **kwargs):
            try:
                call(**kwargs)
            except ValueError as error:
                assert text in str(error), error
                return
            raise SystemExit(f"accepted, but should name {text}")
        result = EvalResult("text-generation", "gsm8k", "GSM8K", "exact_match", 0.5)
        data = ModelCardData(license="mit", base_model="alice/base", model_name="m", eval_results=[result], tags=["t"])
        card = ModelCard(f"---\n{data}\n---\n# Hi\n")
        card.validate()
        api.create_repo("alice/card")
        card.push_to_hub("alice/card")
        assert ModelCard.load("alice/card").data.eval_results == [result]
        info = api.model_info("alice/card")
        assert info.card_data.base_model == "alice/base" and "license:mit" in info.tags

        card.data.base_model = "/runs/original"
        refused('- Error: "base_model" with value "/runs/original" is not valid', card.validate)
        refused('"base_model"', card.push_to_hub, repo_id="alice/card")
        space = SpaceCard("---\nsdk: gradio\ntitle: T\ncolorFrom: teal\n---\n")
        refused('"colorFrom" must be one of', space.validate)
        for text, metadata in (('"license" must be one of', b"license: none-such"), ("YAML", b"tags: [")):
            readme = b"---\n" + metadata + b"\n---\n"
            refused(text, api.upload_file, path_or_fileobj=readme, path_in_repo="README.md", repo_id="alice/card")
        """
    )


def test_collections(client: Client) -> None:
    client(
        """
        from huggingface_hub.errors import HfHubHTTPError
        api.create_repo("alice/shelf", repo_type="dataset")
        made = api.create_collection("My Runs!", description="d")
        assert made.slug.startswith("alice/my-runs-")
        assert api.create_collection("My Runs!", exists_ok=True).slug == made.slug
        api.add_collection_item(made.slug, "alice/shelf", "dataset", note="data")
        api.add_collection_item(made.slug, "alice/shelf", "dataset", exists_ok=True)
        full = api.add_collection_item(made.slug, "2410.09982", "paper")
        assert [(i.item_id, i.item_type, i.note) for i in full.items] == [
            ("alice/shelf", "dataset", "data"), ("2410.09982", "paper", None)]
        try:
            api.add_collection_item(made.slug, "alice/none", "model")
            raise SystemExit("accepted")
        except HfHubHTTPError as error:
            assert error.response.status_code == 404
        api.update_collection_item(made.slug, full.items[1].item_object_id, note="first", position=0)
        renamed = api.update_collection_metadata(made.slug, title="Runs")
        assert renamed.slug.startswith("alice/runs-")
        assert [i.note for i in api.get_collection(made.slug).items] == ["first", "data"]
        api.delete_collection_item(made.slug, full.items[0].item_object_id)
        assert [c.title for c in api.list_collections(owner="alice")] == ["Runs"]
        api.delete_collection(renamed.slug)
        api.delete_collection(renamed.slug, missing_ok=True)
        """
    )


def test_transformers(client: Client) -> None:
    client(
        """
        import torch
        from tokenizers import Tokenizer, models
        from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
        from transformers import PreTrainedTokenizerFast
        config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=1)
        model = LlamaForCausalLM(config)
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
        model.push_to_hub("alice/tiny")
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?", chat_template="hi").push_to_hub("alice/tiny")
        before = api.model_info("alice/tiny").sha
        loaded = AutoModelForCausalLM.from_pretrained("alice/tiny", cache_dir=root / "empty")
        old, new = model.state_dict(), loaded.state_dict()
        assert old.keys() == new.keys() and all(torch.equal(old[k], new[k]) for k in old)
        words = AutoTokenizer.from_pretrained("alice/tiny", revision=before, cache_dir=root / "empty")
        assert (words.chat_template, words("b a").input_ids) == ("hi", [2])  # no pre-tokenizer: one unknown word
        model.push_to_hub("alice/tiny")
        assert api.model_info("alice/tiny").sha == before
        assert api.get_safetensors_metadata("alice/tiny").parameter_count == {"F32": model.num_parameters()}
        """
    )


def test_datasets(client: Client) -> None:
    client(
        r"""
        from datasets import Dataset, load_dataset
        rows = [{"id": str(i), "prompt": f"p{i}"} for i in range(20)]
        (root / "up/data").mkdir(parents=True)
        Dataset.from_list(rows).to_parquet(root / "up/data/train-00000-of-00001.parquet")
        (root / "up/README.md").write_text("---\nconfigs: [{config_name: default, data_files: data/*}]\n---\n")
        api.create_repo("alice/rows", repo_type="dataset")
        api.upload_folder(repo_id="alice/rows", repo_type="dataset", folder_path=root / "up")
        assert load_dataset("alice/rows", split="train").to_list() == rows
        assert list(load_dataset("alice/rows", split="train", streaming=True)) == rows
        Dataset.from_list(rows[:3]).push_to_hub("alice/pushed", "small", split="test")
        sha = api.dataset_info("alice/pushed").sha
        assert load_dataset("alice/pushed", "small", revision=sha)["test"].to_list() == rows[:3]
        """
    )


def test_state_survives_a_restart(tmp_path: Path) -> None:
    code = "from huggingface_hub import HfApi; print(HfApi().{})"
    with LoopbackHub(tmp_path / "hub") as hub:
        env = hub_env(hub, "hf_loopback", tmp_path / "home")
        run_client(code.format("create_repo('tester/kept', repo_type='space', space_sdk='gradio')"), env)
        sha = run_client(code.format("space_info('tester/kept').sha"), env)
    command = [sys.executable, "-m", f"{__package__}.server", "--root", str(tmp_path / "hub")]
    top = Path(__file__).parents[__package__.count(".") + 1]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=top)
    try:
        assert server.stdout
        exported = dict(word.split("=", 1) for word in server.stdout.readline().split()[1:])
        assert run_client(code.format("space_info('tester/kept').sha"), env | exported) == sha
    finally:
        server.terminate()
        server.wait()


def test_half_an_upload_leaves_nothing(hub: LoopbackHub) -> None:
    content = b"never here"
    sha256 = hashlib.sha256(content).hexdigest()
    for sent in (content[:4], b"other data"):  # a client that dies, and one whose file changed under it
        with socket.create_connection(("127.0.0.1", hub.port)) as connection:
            head = f"PUT /blobs/{sha256} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(head.encode() + sent)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(1000).startswith(b"HTTP/1.1 400")
    assert not hub.store.blob(sha256).exists()
    assert not [path for path in (hub.store.root / "blobs").iterdir() if path.is_file()]


def test_object_ids_are_those_of_git(tmp_path: Path) -> None:
    # git sorts the folder "a" as "a/", between "a.txt" and "a0"
    contents = {"a.txt": b"one", "a/b.txt": b"two", "a/c/d.txt": b"three", "a0": b"four", "a-b": b""}
    for path, content in contents.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    for command in (["init", "-q"], ["add", "-A"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    tree = subprocess.run(["git", "write-tree"], cwd=tmp_path, check=True, capture_output=True, text=True)
    entries = {path: Entry(git_oid("blob", content), len(content), "", False) for path, content in contents.items()}
    assert tree_oids(entries)[""] == tree.stdout.strip()
