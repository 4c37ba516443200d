"""Tokens and their roles, organizations, private and gated repositories, through the real client."""

import urllib.request

from .conftest import Client
from .server import LoopbackHub

API = {name: f"{name} = HfApi(token='hf_{name}')\n" for name in ("bob", "reader", "fine", "files")}


def test_roles_of_tokens(hub: LoopbackHub, client: Client) -> None:
    client(
        API["reader"]
        + API["fine"]
        + API["files"]
        + """
def role(api):
    return api.whoami()["auth"]["accessToken"]["role"]
assert (role(api), role(reader), role(fine)) == ("write", "read", "fineGrained")
scoped = fine.whoami()["auth"]["accessToken"]["fineGrained"]["scoped"]
assert [(s["entity"]["type"], s["entity"]["name"]) for s in scoped] == [("user", "alice"), ("org", "lab")]
assert scoped[0]["permissions"] == ["repo.write", "collection.write"]
assert [(o["name"], o["roleInOrg"]) for o in api.whoami()["orgs"]] == [("lab", "write")]

api.create_repo("alice/roles", private=True)
assert reader.model_info("alice/roles").private  # a read-only token sees what its account owns
file = dict(path_or_fileobj=b"x", path_in_repo="x.bin", repo_id="alice/roles")
assert status(reader.upload_file, **file) == 403
assert [status(call, "alice/roles", **kwargs) for call, kwargs in (
    (reader.create_repo, dict(exist_ok=False)), (reader.delete_repo, {}), (reader.create_tag, dict(tag="t")),
    (reader.create_branch, dict(branch="b")), (reader.update_repo_settings, dict(private=False)),
    (reader.create_pull_request, dict(title="mine")), (reader.create_discussion, dict(title="hello")))] == [403] * 7
try:
    reader.upload_file(**file)
except HfHubHTTPError as error:
    assert "must use a write token" in str(error)
# the client itself takes an existing repository for created
assert reader.create_repo("alice/roles", exist_ok=True).repo_id == "alice/roles"
assert status(reader.create_collection, "Shelf") == 403
assert [status(files.create_collection, "Shelf"), status(files.upload_file, **file)] == [403, 200]
assert [status(fine.create_collection, "Shelf"), status(fine.upload_file, **file)] == [200, 200]
assert status(reader.auth_check, "alice/roles") == 200 and status(reader.auth_check, "alice/roles", write=True) == 403
"""
    )


def test_organizations(client: Client) -> None:
    client(
        API["bob"]
        + """
file = dict(path_or_fileobj=b"x", path_in_repo="x", repo_id="lab/shared")
api.create_repo("lab/shared", private=True)
assert api.upload_file(**file).oid == bob.model_info("lab/shared").sha  # bob reads in the lab
assert [status(bob.upload_file, **file), status(bob.create_repo, "lab/bobs")] == [403, 403]
assert HfApi(token=False).list_models(author="lab") and raised(
    HfApi(token=False).model_info, "lab/shared") == "RepositoryNotFoundError"
made = api.create_collection("Lab", namespace="lab", private=True)
assert made.owner["type"] == "org" and bob.get_collection(made.slug).title == "Lab"
assert raised(bob.update_collection_metadata, made.slug, title="Mine") == "HfHubHTTPError"
"""
    )


def test_private_repos_and_collections(client: Client) -> None:
    client(
        API["bob"]
        + """
public = HfApi(token=False)
for kind in ("model", "dataset", "space"):
    repo = dict(repo_id="alice/hidden", repo_type=kind)
    api.create_repo(**repo, private=True, **(dict(space_sdk="gradio") if kind == "space" else {}))
    api.upload_file(path_or_fileobj=b"secret", path_in_repo="a.txt", **repo)
    for other in (bob, public):
        assert raised(other.repo_info, **repo) == "RepositoryNotFoundError"
        assert raised(other.hf_hub_download, filename="a.txt", **repo) == "RepositoryNotFoundError"
        assert raised(other.snapshot_download, **repo) == "RepositoryNotFoundError"
        assert raised(lambda: list(other.list_repo_tree(**repo))) == "RepositoryNotFoundError"
        assert not other.repo_exists(**repo)
    assert raised(HfApi(token="hf_wrong").repo_info, **repo) == "HfHubHTTPError"
    assert Path(api.hf_hub_download(filename="a.txt", **repo)).read_bytes() == b"secret"

api.create_repo("alice/seen")
shelf = api.create_collection("Both").slug
for name in ("alice/hidden", "alice/seen"):
    api.add_collection_item(shelf, name, "model")
def ids(api):
    return [item.item_id for item in api.get_collection(shelf).items]
assert (ids(api), ids(public)) == (["alice/hidden", "alice/seen"], ["alice/seen"])
api.update_repo_settings("alice/hidden", private=False)
assert ids(public) == ["alice/hidden", "alice/seen"] and not public.model_info("alice/hidden").private
api.update_repo_settings("alice/hidden", visibility="private")
api.update_collection_metadata(shelf, private=True)
assert raised(public.get_collection, shelf) == "HfHubHTTPError"
assert "Both" not in [c.title for c in public.list_collections(owner="alice")]
assert "Both" in [c.title for c in api.list_collections(owner="alice")]
"""
    )


def test_gates(hub: LoopbackHub, client: Client) -> None:
    client(
        API["bob"]
        + """
public = HfApi(token=False)
api.create_repo("alice/gated")
api.upload_file(path_or_fileobj=b"{}", path_in_repo="config.json", repo_id="alice/gated")
assert status(api.grant_access, "alice/gated", "bob") == 400  # no gate yet
api.update_repo_settings("alice/gated", gated="manual")
file = dict(repo_id="alice/gated", filename="config.json")
for other, code in ((bob, 403), (public, 401)):
    # what it is and what is in it is public
    assert other.model_info("alice/gated").gated == "manual"
    assert [f.path for f in other.list_repo_tree("alice/gated")] == [".gitattributes", "config.json"]
    assert (raised(other.hf_hub_download, **file), status(other.hf_hub_download, **file)) == ("GatedRepoError", code)
    assert raised(other.snapshot_download, "alice/gated") == "GatedRepoError"
    assert raised(other.auth_check, "alice/gated") == "GatedRepoError"
assert api.hf_hub_download(**file)  # the owner needs no permission
assert status(api.grant_access, "alice/gated", "nobody") == 404
assert status(bob.grant_access, "alice/gated", "bob") == 403
"""
    )
    ask = urllib.request.Request(f"{hub.endpoint}/alice/gated/ask-access", method="POST")
    ask.add_header("Authorization", "Bearer hf_bob")
    urllib.request.urlopen(ask).close()  # the button on the repository's page
    client(
        API["bob"]
        + """
# a file that is in the cache already is taken from there, whatever the Hub says
file = dict(repo_id="alice/gated", filename="config.json", cache_dir=root / "bob")
def asked(status):
    return [request.username for request in getattr(api, f"list_{status}_access_requests")("alice/gated")]
assert asked("pending") == ["bob"] and raised(bob.hf_hub_download, **file) == "GatedRepoError"
api.accept_access_request("alice/gated", "bob")
assert (asked("pending"), asked("accepted")) == ([], ["bob"])
assert bob.hf_hub_download(**file) and bob.auth_check("alice/gated") is None
assert raised(bob.upload_file, path_or_fileobj=b"", path_in_repo="x", repo_id="alice/gated") == "HfHubHTTPError"
api.reject_access_request("alice/gated", "bob", rejection_reason=None)
assert raised(bob.auth_check, "alice/gated") == "GatedRepoError" and asked("rejected") == ["bob"]
api.update_repo_settings("alice/gated", gated=False)
assert bob.auth_check("alice/gated") is None
"""
    )
