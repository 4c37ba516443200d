"""Searches, pages, collections and Spaces, through the real client; what `HEAD`, `raw` and ETags answer."""

import urllib.error
import urllib.request

from .conftest import Client
from .server import LoopbackHub


def test_searches(hub: LoopbackHub, client: Client) -> None:
    client(
        r"""
        bob = HfApi(token="hf_bob")
        def card(**fields):
            lines = "".join(f"{key}: {value}\n" for key, value in fields.items())
            return f"---\n{lines}---\n".encode()
        def made(api, name, kind="model", private=False, **fields):
            sdk = dict(space_sdk="gradio") if kind == "space" else {}
            api.create_repo(name, repo_type=kind, private=private, **sdk)
            api.upload_file(path_or_fileobj=card(**fields), path_in_repo="README.md", repo_id=name, repo_type=kind)
        common = dict(tags="[hfsd, layer-pruning]", license="mit")
        facts = dict(base_model="alice/base", base_model_relation="finetune", datasets="[alice/rows]",
                     pipeline_tag="text-generation", library_name="transformers")
        made(api, "alice/Tiny-pruned2", **common, **facts)
        made(api, "alice/plain", license="mit")
        made(api, "alice/draft", private=True, **common)
        made(bob, "bob/tiny-pruned2", **common)
        made(api, "alice/rows", "dataset", **common, language="en")
        space = dict(sdk="gradio", colorFrom="red", colorTo="blue", title="T", tags="[hfsd]", models="[alice/plain]")
        made(api, "alice/demo", "space", **space)

        def ids(found):
            return [one.id for one in found]
        mine = api.list_models(author="alice", filter="hfsd")
        assert ids(mine) == ["alice/Tiny-pruned2", "alice/draft"]
        assert ids(bob.list_models(author="alice", filter="hfsd")) == ["alice/Tiny-pruned2"]
        assert ids(bob.list_models(filter=["hfsd", "layer-pruning"])) == ["alice/Tiny-pruned2", "bob/tiny-pruned2"]
        assert ids(bob.list_models(search="TINY", author="bob")) == ["bob/tiny-pruned2"]
        for wanted in (dict(pipeline_tag="text-generation"), dict(trained_dataset="alice/rows"),
                       dict(filter="base_model:alice/base"), dict(filter="base_model:finetune:alice/base"),
                       dict(filter="transformers")):
            assert ids(api.list_models(author="alice", **wanted)) == ["alice/Tiny-pruned2"], wanted
        assert ids(api.list_models(author="nobody")) == [] and ids(api.list_models(filter="hfsd", author="lab")) == []
        assert ids(api.list_datasets(author="alice", filter="hfsd")) == ["alice/rows"]
        assert ids(api.list_datasets(filter="language:en")) == ["alice/rows"]
        assert ids(api.list_spaces(author="alice", filter="hfsd")) == ["alice/demo"]
        newest = api.list_models(author="alice", sort="last_modified", limit=1)
        assert ids(newest) == ["alice/draft"]

        # a search is brief: the commit, the card and the files of a model come only when asked for
        (one,) = api.list_models(author="alice", search="Tiny")
        assert (one.sha, one.card_data, one.siblings, one.last_modified) == (None,) * 4 and "hfsd" in one.tags
        (one,) = api.list_models(author="alice", search="Tiny", cardData=True)
        assert one.card_data.base_model == "alice/base"
        (one,) = api.list_models(author="alice", search="Tiny", expand=["sha", "gated"])
        assert (one.sha, one.gated, one.tags) == (api.model_info("alice/Tiny-pruned2").sha, False, None)
        (one,) = api.list_models(author="alice", search="Tiny", full=True)
        assert [s.rfilename for s in one.siblings] == [".gitattributes", "README.md"]
        """
    )


def test_pages(hub: LoopbackHub, client: Client) -> None:
    before, hub.page_size = hub.page_size, 3
    try:
        client(
            """
            from huggingface_hub import CommitOperationAdd
            for name in "abcdefg":
                api.create_repo(f"lab/page-{name}")
                api.create_collection(f"Page {name}", namespace="lab")
            assert [m.id[-1] for m in api.list_models(author="lab", search="page-")] == list("abcdefg")
            assert [m.id[-1] for m in api.list_models(author="lab", search="page-", limit=4)] == list("abcd")
            assert len(list(api.list_collections(owner="lab"))) == 7
            files = [CommitOperationAdd(f"{i:02}/x.txt", b"%d" % i) for i in range(8)]
            api.create_commit("lab/page-a", files, commit_message="many")
            assert len(list(api.list_repo_tree("lab/page-a", recursive=True))) == 17
            for i in range(4):
                api.upload_file(path_or_fileobj=b"%d" % i, path_in_repo="n", repo_id="lab/page-a")
            assert len(api.list_repo_commits("lab/page-a")) == 6
            """
        )
    finally:
        hub.page_size = before
    assert [call for call in hub.calls if "cursor=3" in call.path and call.path.startswith("/api/models?")]


def test_collections_in_order(client: Client) -> None:
    client(
        """
        for name, kind in (("m1", "model"), ("m2", "model"), ("d", "dataset"), ("s", "space")):
            sdk = dict(space_sdk="static") if kind == "space" else {}
            api.create_repo(f"alice/shelf-{name}", repo_type=kind, **sdk)
        made = api.create_collection("Family", description="x" * 150)
        assert status(api.create_collection, "Long", description="x" * 151) == 400
        assert status(api.create_collection, "Family") == 409
        for name, kind in (("s", "space"), ("m2", "model"), ("m1", "model"), ("d", "dataset")):
            shelf = api.add_collection_item(made.slug, f"alice/shelf-{name}", kind, note=f"the {name}")
        assert status(api.add_collection_item, made.slug, "alice/shelf-d", "dataset") == 409
        order = ["d", "m1", "m2", "s"]  # reading order
        for position, name in enumerate(order):
            (item,) = [i for i in api.get_collection(made.slug).items if i.item_id == f"alice/shelf-{name}"]
            api.update_collection_item(made.slug, item.item_object_id, position=position)
        shelf = api.get_collection(made.slug)
        assert [(i.item_id, i.note, i.position) for i in shelf.items] == [
            (f"alice/shelf-{name}", f"the {name}", position) for position, name in enumerate(order)]
        told = api.update_collection_metadata(made.slug, description="short", theme="green", private=True)
        assert (told.description, told.theme, told.private, len(told.items)) == ("short", "green", True, 4)
        holding = api.list_collections(owner="alice", item="datasets/alice/shelf-d")
        assert [c.title for c in holding] == ["Family"]
        assert not list(api.list_collections(owner="alice", item="models/alice/shelf-d"))
        assert status(HfApi(token="hf_bob").delete_collection, made.slug) == 404  # it is private by now
        api.delete_repo("alice/shelf-m2")  # and leaves the collection
        assert [i.item_id[-1] for i in api.get_collection(made.slug).items] == ["d", "1", "s"]
        api.delete_collection_item(made.slug, shelf.items[3].item_object_id)
        api.delete_collection(made.slug)
        assert status(api.get_collection, made.slug) == 404
        """
    )


def test_spaces(client: Client) -> None:
    client(
        """
        assert status(api.create_repo, "bob/demo", repo_type="space", space_sdk="gradio") == 403
        api.create_repo("alice/app", repo_type="space", space_sdk="gradio")
        assert api.get_space_runtime("alice/app").stage == "NO_APP_FILE"
        info = api.space_info("alice/app")
        assert (info.sdk, info.card_data.title) == ("gradio", "app")
        here = dict(repo_id="alice/app", repo_type="space")
        for name in ("app.py", "picture.png"):
            api.upload_file(path_or_fileobj=b"x", path_in_repo=name, **here)
        assert api.get_space_runtime("alice/app").stage == "RUNNING"
        assert {f.path: bool(f.lfs) for f in api.list_repo_tree(**here)}["picture.png"]
        assert Path(hf_hub_download(filename="picture.png", **here)).read_bytes() == b"x"
        assert api.repo_exists("alice/app") is False  # a Space is not a model of the same name
        """
    )


def _head(url: str, method: str = "HEAD", **headers: str) -> tuple[int, dict[str, str], bytes]:
    request = urllib.request.Request(url, method=method, headers={k.replace("_", "-"): v for k, v in headers.items()})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, dict(answer.headers), answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, dict(error.headers), b""


def test_etags_and_raw_files(hub: LoopbackHub, client: Client) -> None:
    sha = client(
        """
        api.create_repo("alice/raw")
        api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="large.bin", repo_id="alice/raw")
        print(api.upload_file(path_or_fileobj=b"text", path_in_repo="small.txt", repo_id="alice/raw").oid)
        """
    ).strip()
    site = f"{hub.endpoint}/alice/raw"
    code, headers, body = _head(f"{site}/resolve/main/small.txt", "GET")
    assert (code, body, headers["X-Repo-Commit"]) == (200, b"text", sha)
    assert _head(f"{site}/resolve/main/small.txt", "GET", If_None_Match=headers["ETag"])[0] == 304
    assert _head(f"{site}/resolve/{sha}/large.bin", "GET", Range="bytes=2-4")[::2] == (206, b"234")
    assert b"oid sha256:" in _head(f"{site}/raw/main/large.bin", "GET")[2]
    assert [_head(f"{site}/raw/main/{name}")[0] for name in ("large.bin", "small.txt", "none")] == [200, 200, 404]
