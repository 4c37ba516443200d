"""Large files: git-lfs's batch call, one PUT or many parts per object, and the check at the end.

Blob and part URLs stand in for the signed URLs of object storage: the client sends them no token.
"""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import HubError
from .messages import Request, Response, file_response, json_response, route
from .store import read_chunks


@route("POST", "/(?:(?P<kind>datasets|spaces)/)?REPO\\.git/info/lfs/objects/batch")
def lfs_batch(request: Request, repo_id: str, kind: str = "models") -> Response:
    """Where to put each object; no actions for content that the server already has, from any repository."""
    store, hub = request.hub.store, request.hub
    repo = store.repo(kind, repo_id, request.user)
    request.writer()  # of any repository that it sees: what is sent may become a pull request
    body = request.json()
    parted = "multipart" in body.get("transfers", ["basic"])
    objects = []
    for item in body["objects"]:
        answer = {"oid": item["oid"], "size": item["size"]}
        if not store.blob(item["oid"]).is_file():
            verify = {"href": f"{hub.endpoint}/{repo.prefix}.git/info/lfs/verify"}
            large = parted and hub.part_size is not None and item["size"] > hub.part_size
            upload = _parts(request, item["oid"], item["size"]) if large else {"href": hub.blob_url(item["oid"])}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return json_response({"transfer": "multipart" if parted else "basic", "objects": objects})


def _parts(request: Request, oid: str, size: int) -> dict[str, Any]:
    """The upload action of an object that travels in parts: their size, a URL for each, and where to say it is done."""
    hub = request.hub
    assert hub.part_size
    count = -(-size // hub.part_size)
    urls = {str(n): f"http://localhost:{hub.port}/parts/{oid}/{n}" for n in range(1, count + 1)}
    header = {"chunk_size": str(hub.part_size), **urls}
    return {"href": f"{hub.endpoint}/api/complete_multipart/{oid}", "header": header}


def _folder(request: Request, oid: str) -> Path:
    return request.hub.store.root / "uploads" / oid


@route("PUT", "/parts/(?P<oid>[0-9a-f]{64})/(?P<number>[0-9]+)")
def put_part(request: Request, oid: str, number: str) -> Response:
    assert request.stream is not None
    folder = _folder(request, oid)
    folder.mkdir(parents=True, exist_ok=True)
    content = b"".join(read_chunks(request.stream, int(request.headers.get("content-length", 0))))
    (folder / number).write_bytes(content)
    return Response(headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})


@route("POST", "/api/complete_multipart/(?P<oid>[0-9a-f]{64})")
def complete(request: Request, oid: str) -> Response:
    """Joins the parts. Each must be the one that was acknowledged, and the whole must have the object's sha256."""
    parts = sorted(request.json()["parts"], key=lambda part: part["partNumber"])
    folder = _folder(request, oid)

    def joined() -> Iterator[bytes]:
        for part in parts:
            path = folder / str(part["partNumber"])
            content = path.read_bytes() if path.is_file() else b""
            if part["etag"].strip('"') != hashlib.md5(content).hexdigest():
                raise HubError(400, f"Part {part['partNumber']} is not the one that was uploaded")
            yield content

    request.hub.store.put_blob(joined(), expect=oid)
    shutil.rmtree(folder, ignore_errors=True)
    return json_response({"success": True})


@route("POST", "/(?:(?P<kind>datasets|spaces)/)?REPO\\.git/info/lfs/verify")
def lfs_verify(request: Request, repo_id: str, kind: str = "models") -> Response:
    request.hub.store.repo(kind, repo_id, request.user)
    request.writer()
    body = request.json()
    blob = request.hub.store.blob(body["oid"])
    if not blob.is_file() or blob.stat().st_size != body["size"]:
        raise HubError(404, f"Object {body['oid']} of {body['size']} bytes was not uploaded")
    return json_response({})


@route("GET", "/api/KIND/REPO/xet-(?:read|write)-token/REV")
def no_xet(request: Request, **_: str) -> Response:
    raise HubError(404, "This Hub has no Xet storage: set HF_HUB_DISABLE_XET=1 before huggingface_hub is imported")


@route("PUT", "/blobs/(?P<sha256>[0-9a-f]{64})")
def put_blob(request: Request, sha256: str) -> Response:
    assert request.stream is not None
    length = int(request.headers.get("content-length", 0))
    request.hub.store.put_blob(read_chunks(request.stream, length), expect=sha256)
    return Response(headers={"ETag": f'"{sha256}"'})


@route("GET", "/blobs/(?P<sha256>[0-9a-f]{64})")
@route("HEAD", "/blobs/(?P<sha256>[0-9a-f]{64})")
def get_blob(request: Request, sha256: str) -> Response:
    blob = request.hub.store.blob(sha256)
    if not blob.is_file():
        raise HubError(404, "No such object")
    return file_response(request, blob, sha256)
