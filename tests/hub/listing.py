"""What the Hub tells of repositories: one in full, or a search over all of them."""

from typing import Any

import yaml

from .cards import front_matter
from .messages import Request, Response, json_response, paged, route
from .store import Commit, Repo, git_oid

# What a search tells of each repository unless it is asked for more, by `full`, `cardData` or `expand`: a reader that
# wants the commit, the card or the gate of a model must ask, here as on the Hub.
_BRIEF = {
    "models": "_id id likes private downloads tags pipeline_tag library_name createdAt",
    "datasets": "_id id author disabled gated lastModified likes private sha downloads tags createdAt",
    "spaces": "_id id likes private sdk tags createdAt",
}
_LISTED = ("tags", "language", "metrics", "task_categories", "size_categories")
_PREFIXES = {"license": "license:", "datasets": "dataset:", "base_model": "base_model:"}
_OF_DATASETS = {"language": "language:", "task_categories": "task_categories:", "size_categories": "size_categories:"}


@route("GET", "/api/KIND")
def list_repos(request: Request, kind: str) -> Response:
    """Search by author, words in the id, tags (all of them), pipeline and gate; newest first when sorted."""
    query = {name: values[0] for name, values in request.query.items()}
    found = []
    for repo in request.hub.store.repos(kind, request.user):
        if query.get("author", repo.namespace) == repo.namespace and query.get("search", "").lower() in repo.id.lower():
            info = describe(request, repo, request.hub.store.resolve(repo, "main"))
            if _wanted(request, info):
                found.append(info)
    if "sort" in query:
        found.sort(key=lambda info: info.get(query["sort"]) or 0, reverse=True)
    return paged(request, [_brief(request, kind, info) for info in found])


def _wanted(request: Request, info: dict[str, Any]) -> bool:
    query = request.query
    gated = query.get("gated", [""])[0].lower()
    return (
        set(query.get("filter", [])) <= set(info["tags"])
        and query.get("pipeline_tag", [info.get("pipeline_tag")])[0] == info.get("pipeline_tag")
        and gated in ("", str(bool(info["gated"])).lower())
        and {f"dataset:{name}" for name in query.get("datasets", [])} <= set(info["tags"])
    )


def _brief(request: Request, kind: str, info: dict[str, Any]) -> dict[str, Any]:
    if asked := expanded(request):
        return {key: value for key, value in info.items() if key in ("_id", "id", *asked)}
    if request.flag("full"):
        return info
    more = ["cardData"] if request.flag("cardData") else []
    return {key: value for key, value in info.items() if key in (*_BRIEF[kind].split(), *more)}


def expanded(request: Request) -> list[str]:
    """The properties that a call asks for by name."""
    return [*request.query.get("expand", []), *request.query.get("expand[]", [])]


def describe(request: Request, repo: Repo, commit: Commit) -> dict[str, Any]:
    """Everything that is told of a repository at a commit."""
    card = card_of(request, commit)
    siblings: list[dict[str, Any]] = [{"rfilename": path} for path in commit.files]
    if request.flag("blobs"):
        for sibling, entry in zip(siblings, commit.files.values(), strict=True):
            lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
            sibling |= {"size": entry.size, "blobId": entry.oid, **({"lfs": lfs} if entry.lfs else {})}
    return {
        "_id": git_oid("blob", repo.prefix.encode())[:24],
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.id,
        "createdAt": repo.meta["created"],
        "lastModified": commit.date,
        "private": repo.meta["private"],
        "gated": repo.meta.get("gated", False),
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": _tags(repo, card),
        "cardData": card,
        "siblings": siblings,
        "usedStorage": sum(entry.size for entry in commit.files.values()),
        **({"sdk": card.get("sdk", repo.meta["sdk"])} if repo.kind == "spaces" else {}),
        **({k: card[k] for k in ("library_name", "pipeline_tag", "model-index") if k in card}),
    }


def _tags(repo: Repo, card: dict[str, Any]) -> list[str]:
    """The card's own tags and those that the Hub makes of its other fields."""
    prefixes = _PREFIXES | (_OF_DATASETS if repo.kind == "datasets" else {})
    tags = [str(card[key]) for key in ("library_name", "pipeline_tag", "sdk") if card.get(key)]
    for key in dict.fromkeys((*_LISTED, *prefixes)):
        values = card.get(key) or []
        tags += [f"{prefixes.get(key, '')}{v}" for v in (values if isinstance(values, list) else [values])]
    if (relation := card.get("base_model_relation")) and (bases := card.get("base_model")):
        tags += [f"base_model:{relation}:{base}" for base in (bases if isinstance(bases, list) else [bases])]
    return list(dict.fromkeys(tags))


def card_of(request: Request, commit: Commit) -> dict[str, Any]:
    """The metadata of a commit's README; empty where there is none."""
    readme = commit.files.get("README.md")
    try:
        return front_matter(request.hub.store.read(readme).decode()) or {} if readme else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}


@route("GET", "/api/spaces/REPO/runtime")
def space_runtime(request: Request, repo_id: str) -> Response:
    """Nothing runs here: a Space with its app file is told to run, one without is not."""
    repo = request.hub.store.repo("spaces", repo_id, request.user)
    commit = request.hub.store.resolve(repo, "main")
    app = card_of(request, commit).get("app_file", "app.py")
    stage = "RUNNING" if app in commit.files else "NO_APP_FILE"
    return json_response({"stage": stage, "hardware": {"current": "cpu-basic", "requested": "cpu-basic"}})
