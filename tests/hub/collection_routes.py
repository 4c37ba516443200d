"""Collections: lists of repositories with notes, under a namespace."""

import json
import re
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import HubError
from .messages import Request, Response, json_response, paged, route
from .store import KINDS, write_json


def _path(request: Request) -> Path:
    return request.hub.store.root / "collections.json"


def _load(request: Request) -> dict[str, dict[str, Any]]:
    path = _path(request)
    return json.loads(path.read_text()) if path.exists() else {}


def _find(request: Request, slug: str) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """All collections and the one asked for, by the id at the end of its slug: a new title keeps old links working."""
    every = _load(request)
    for collection in every.values():
        same = collection["slug"].rpartition("-")[2] == slug.rpartition("-")[2]
        if same and _shown(request, collection):
            return every, collection
    raise HubError(404, f"Collection not found: {slug}")


def _shown(request: Request, collection: dict[str, Any]) -> bool:
    return not collection["private"] or request.hub.accounts.may_read(request.user, collection["owner"]["name"])


def _told(request: Request, collection: dict[str, Any]) -> dict[str, Any]:
    """A collection as this user sees it: without what has been deleted or is private to somebody else."""

    def there(item: dict[str, Any]) -> bool:
        try:
            return item["type"] not in KINDS or bool(
                request.hub.store.repo(KINDS[item["type"]], item["id"], request.user)
            )
        except HubError:
            return False

    return collection | {"items": [item for item in collection["items"] if there(item)]}


def _save(request: Request, every: dict[str, dict[str, Any]], collection: dict[str, Any]) -> Response:
    for position, item in enumerate(collection["items"]):
        item["position"] = position
    collection["lastUpdated"] = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    write_json(_path(request), every)
    return json_response(collection)


def _slug(namespace: str, title: str, object_id: str) -> str:
    return f"{namespace}/{re.sub('[^a-z0-9]+', '-', title.lower()).strip('-')}-{object_id}"


def _note(text: str | None) -> dict[str, Any]:
    return {"note": {"text": text, "html": text}} if text else {}


@route("GET", "/api/collections")
def list_collections(request: Request) -> Response:
    owners, wanted = request.query.get("owner", []), set(request.query.get("item", []))
    found = []
    for collection in _load(request).values():
        named = {f"{KINDS.get(item['type'], 'papers')}/{item['id']}" for item in collection["items"]}
        if (owners and collection["owner"]["name"] not in owners) or (wanted and not wanted & named):
            continue
        if not _shown(request, collection):
            continue
        # as on the Hub: four items at most, and no position (the client counts by itself, and fails if one is sent)
        entry = {key: value for key, value in _told(request, collection).items() if key != "position"}
        found.append(entry | {"items": entry["items"][:4]})
    if request.query.get("sort") == ["lastModified"]:
        found.sort(key=lambda entry: entry["lastUpdated"], reverse=True)
    return paged(request, found)


@route("POST", "/api/collections")
def create_collection(request: Request) -> Response:
    body = request.json()
    namespace = body.get("namespace") or request.signed_in()
    request.writer(namespace, "collection.write")
    if not body.get("title") or len(body.get("description") or "") > 150:
        raise HubError(400, "A collection needs a title, and a description of at most 150 characters")
    with request.hub.store.lock:
        every = _load(request)
        for other in every.values():
            if (other["owner"]["name"], other["title"]) == (namespace, body["title"]):
                raise HubError(409, "Collection exists", body={"error": "Collection exists", "slug": other["slug"]})
        object_id = secrets.token_hex(12)
        collection = {
            "slug": _slug(namespace, body["title"], object_id),
            "title": body["title"],
            "description": body.get("description"),
            "owner": {"name": namespace, "type": "org" if namespace in request.hub.accounts.orgs else "user"},
            "private": bool(body.get("private")),
            "theme": "blue",
            "upvotes": 0,
            "position": len(every),
            "items": [],
        }
        return _save(request, every | {object_id: collection}, collection)


@route("GET", "/api/collections/SLUG")
def get_collection(request: Request, slug: str) -> Response:
    return json_response(_told(request, _find(request, slug)[1]))


@route("PATCH", "/api/collections/SLUG")
def update_collection(request: Request, slug: str) -> Response:
    with request.hub.store.lock:
        every, collection = _find(request, slug)
        request.writer(collection["owner"]["name"], "collection.write")
        known = ("title", "description", "private", "theme", "position")
        collection |= {key: value for key, value in request.json().items() if key in known}
        object_id = collection["slug"].rpartition("-")[2]
        collection["slug"] = _slug(collection["owner"]["name"], collection["title"], object_id)
        _save(request, every, collection)
        return json_response({"success": True, "data": collection})


@route("DELETE", "/api/collections/SLUG")
def delete_collection(request: Request, slug: str) -> Response:
    with request.hub.store.lock:
        every, collection = _find(request, slug)
        request.writer(collection["owner"]["name"], "collection.write")
        write_json(_path(request), {k: v for k, v in every.items() if v is not collection})
    return json_response({"success": True})


@route("POST", "/api/collections/SLUG/items")
def add_item(request: Request, slug: str) -> Response:
    body = request.json()
    item_id, item_type = body["item"]["id"], body["item"]["type"]
    with request.hub.store.lock:
        every, collection = _find(request, slug)
        request.writer(collection["owner"]["name"], "collection.write")
        if item_type in KINDS:
            request.hub.store.repo(KINDS[item_type], item_id, request.user)  # 404 unless it exists
        if any((item["id"], item["type"]) == (item_id, item_type) for item in collection["items"]):
            raise HubError(409, f"{item_type} {item_id} is already in the collection")
        item = {"_id": secrets.token_hex(12), "id": item_id, "type": item_type, **_note(body.get("note"))}
        collection["items"].append(item)
        return _save(request, every, collection)


def _item(request: Request, slug: str, item_id: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    every, collection = _find(request, slug)
    request.writer(collection["owner"]["name"], "collection.write")
    for item in collection["items"]:
        if item["_id"] == item_id:
            return every, collection, item
    raise HubError(404, f"No item {item_id} in collection {slug}")


@route("PATCH", "/api/collections/SLUG/items/(?P<item_id>[^/]+)")
def update_item(request: Request, slug: str, item_id: str) -> Response:
    body = request.json()
    with request.hub.store.lock:
        every, collection, item = _item(request, slug, item_id)
        item |= _note(body.get("note"))
        if "position" in body:
            collection["items"].remove(item)
            collection["items"].insert(body["position"], item)
        return _save(request, every, collection)


@route("DELETE", "/api/collections/SLUG/items/(?P<item_id>[^/]+)")
def delete_item(request: Request, slug: str, item_id: str) -> Response:
    with request.hub.store.lock:
        every, collection, item = _item(request, slug, item_id)
        collection["items"].remove(item)
        return _save(request, every, collection)
