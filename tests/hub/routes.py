"""The Hub's calls on accounts, repositories, files and refs, as huggingface_hub 2.4 makes them."""

from typing import Any

from .access_routes import check_gate
from .cards import check_card
from .errors import HubError, entry_not_found, repo_not_found, revision_not_found
from .listing import describe, expanded
from .messages import Request, Response, file_response, json_response, paged, route
from .store import KINDS, LFS_SUFFIXES, Commit, Entry, Repo, tree_oids

SPACE_README = "---\ntitle: {name}\nemoji: 🚀\ncolorFrom: blue\ncolorTo: red\nsdk: {sdk}\napp_file: app.py\n---\n"


# accounts and cards


@route("GET", "/api/whoami-v2")
def whoami(request: Request) -> Response:
    user = request.signed_in()
    return json_response(request.hub.accounts.profile(request.token or "", user))


@route("POST", "/api/validate-yaml")
def validate_yaml(request: Request) -> Response:
    body = request.json()
    errors, warnings = check_card(body.get("content", ""), body.get("repoType") or "model")
    status = 400 if errors else 200
    if request.headers.get("accept") == "text/plain":  # `RepoCard.validate` shows this text as it is
        lines = [f"- Error: {m}" for m in errors] + [f"- Warning: {m}" for m in warnings]
        return Response(status, "\n".join(lines).encode(), {"Content-Type": "text/plain; charset=utf-8"})
    report = {"errors": [{"message": m} for m in errors], "warnings": [{"message": m} for m in warnings]}
    return json_response(report, status)


@route("GET", "/api/agent-harnesses")
def agent_harnesses(request: Request) -> Response:
    """The `hf` command line asks which environment variables mean that a coding agent runs it: none."""
    return json_response({"standardEnvVars": [], "harnesses": {}})


# repositories: create, delete, describe


def _named(request: Request) -> tuple[str, str, dict[str, Any]]:
    """(kind, repository id, body) of the calls that name the repository in the body."""
    body = request.json()
    kind = KINDS.get(body.get("type") or "model")
    if not kind or not body.get("name"):
        raise HubError(400, f"Needs a name and a known type, got {body.get('name')!r} and {body.get('type')!r}")
    return kind, f"{body.get('organization') or request.signed_in()}/{body['name']}", body


@route("POST", "/api/repos/create")
def create_repo(request: Request) -> Response:
    kind, repo_id, body = _named(request)
    user = request.writer(repo_id.split("/")[0])
    store = request.hub.store
    attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
    files = {".gitattributes": store.regular_entry(attributes.encode())}
    if kind == "spaces":
        if not body.get("sdk"):
            raise HubError(400, '"sdk" is required for a Space')
        readme = SPACE_README.format(name=body["name"], sdk=body["sdk"])
        files["README.md"] = store.regular_entry(readme.encode())
    private = body.get("visibility") == "private" or bool(body.get("private"))
    url = f"{request.hub.endpoint}/{Repo(kind, repo_id, store.root, {}).prefix}"
    try:
        store.create(kind, repo_id, user, files, private=private, sdk=body.get("sdk"))
    except HubError as error:
        if error.status == 409:  # `create_repo(exist_ok=True)` reads the url from the refusal
            raise HubError(409, str(error), body={"error": str(error), "url": url}) from error
        raise
    return json_response({"url": url, "name": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(request: Request) -> Response:
    kind, repo_id, _ = _named(request)
    request.writer(repo_id.split("/")[0])
    request.hub.store.delete(request.hub.store.repo(kind, repo_id, request.user))
    return json_response({})


@route("GET", "/api/KIND/REPO")
@route("GET", "/api/KIND/REPO/revision/REV")
def repo_info(request: Request, kind: str, repo_id: str, rev: str = "main") -> Response:
    repo, commit = _at(request, kind, repo_id, rev)
    info = describe(request, repo, commit)
    if wanted := expanded(request):
        return json_response({k: v for k, v in info.items() if k in ("_id", "id", *wanted)})
    return json_response(info)


@route("GET", "/api/KIND/[^/]+(?:/(?:revision|tree)/REV)?")
@route("GET", "/[^/]+/resolve/REV/.+")
@route("HEAD", "/[^/]+/resolve/REV/.+")
def without_namespace(request: Request, **_: str) -> Response:
    """Names such as "gpt2", which only the real Hub has."""
    raise repo_not_found()


def _at(request: Request, kind: str, repo_id: str, rev: str) -> tuple[Repo, Commit]:
    repo = request.hub.store.repo(kind, repo_id, request.user)
    return repo, request.hub.store.resolve(repo, rev)


# files of a revision


def _file_info(path: str, entry: Entry) -> dict[str, Any]:
    info: dict[str, Any] = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
    if entry.lfs:
        info["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
    return info


def _listing(request: Request, repo: Repo, commit: Commit, expand: bool) -> dict[str, dict[str, Any]]:
    """Every file and folder of the commit by path, folders before what they hold."""
    items = {path: _file_info(path, entry) for path, entry in commit.files.items()}
    folders = {path: oid for path, oid in tree_oids(commit.files).items() if path}
    items |= {path: {"type": "directory", "oid": oid, "size": 0, "path": path} for path, oid in folders.items()}
    if expand:
        for step in request.hub.store.history(repo, commit):  # the oldest commit with the same id introduced it
            ids = {path: entry.oid for path, entry in step.files.items()} | tree_oids(step.files)
            last = {"id": step.id, "title": step.title, "date": step.date}
            for path, item in items.items():
                unchanged = item.setdefault("unchanged", True) and ids.get(path) == item["oid"]
                item.update({"lastCommit": last} if unchanged else {"unchanged": False})
        for item in items.values():
            del item["unchanged"]
    return dict(sorted(items.items()))


@route("GET", "/api/KIND/REPO/tree/REV(?:/(?P<path>.+))?")
def tree(request: Request, kind: str, repo_id: str, rev: str, path: str = "") -> Response:
    repo, commit = _at(request, kind, repo_id, rev)
    items = _listing(request, repo, commit, request.flag("expand"))
    folder = path.strip("/")
    if folder and items.get(folder, {}).get("type") != "directory":
        raise entry_not_found(folder, commit.id)
    below = {p: i for p, i in items.items() if not folder or p.startswith(f"{folder}/")}
    if not request.flag("recursive"):
        below = {p: i for p, i in below.items() if p.rpartition("/")[0] == folder}
    return paged(request, list(below.values()))


@route("POST", "/api/KIND/REPO/paths-info/REV")
def paths_info(request: Request, kind: str, repo_id: str, rev: str) -> Response:
    repo, commit = _at(request, kind, repo_id, rev)
    form = request.form()
    expand = str(form.get("expand", [""])[0]).lower() == "true"
    items = _listing(request, repo, commit, expand)
    return json_response([items[path] for path in form.get("paths", []) if path in items])


@route("GET", "/(?:(?P<kind>datasets|spaces)/)?REPO/resolve/REV/(?P<path>.+)")
@route("HEAD", "/(?:(?P<kind>datasets|spaces)/)?REPO/resolve/REV/(?P<path>.+)")
def resolve(request: Request, repo_id: str, rev: str, path: str, kind: str = "models") -> Response:
    entry, headers = _file_at(request, kind, repo_id, rev, path)
    if not entry.lfs:
        return file_response(request, request.hub.store.blob(entry.sha256), entry.etag, headers)
    headers |= {"X-Linked-Etag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
    return Response(302, headers={**headers, "Location": request.hub.blob_url(entry.sha256)})


@route("GET", "/(?:(?P<kind>datasets|spaces)/)?REPO/raw/REV/(?P<path>.+)")
@route("HEAD", "/(?:(?P<kind>datasets|spaces)/)?REPO/raw/REV/(?P<path>.+)")
def raw(request: Request, repo_id: str, rev: str, path: str, kind: str = "models") -> Response:
    """What git has: of an LFS file the pointer. The JavaScript client asks with HEAD whether a file exists."""
    entry, headers = _file_at(request, kind, repo_id, rev, path)
    if not entry.lfs:
        return file_response(request, request.hub.store.blob(entry.sha256), entry.etag, headers)
    return Response(200, entry.pointer, headers | {"ETag": f'"{entry.oid}"', "Content-Type": "text/plain"})


def _file_at(request: Request, kind: str, repo_id: str, rev: str, path: str) -> tuple[Entry, dict[str, str]]:
    """A file, and the header that names its commit; refused where the repository is gated."""
    repo, commit = _at(request, kind, repo_id, rev)
    check_gate(request, repo)
    if (entry := commit.files.get(path)) is None:
        raise entry_not_found(path, commit.id)
    return entry, {"X-Repo-Commit": commit.id}


# refs and history


@route("GET", "/api/KIND/REPO/refs")
def refs(request: Request, kind: str, repo_id: str) -> Response:
    repo = request.hub.store.repo(kind, repo_id, request.user)
    found: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    lists = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}
    for ref, oid in sorted(repo.refs.items()):
        _, group, name = ref.split("/", 2)
        found[lists[group]].append({"name": name, "ref": ref, "targetCommit": oid})
    return json_response(found)


@route("GET", "/api/KIND/REPO/commits/REV")
def commits(request: Request, kind: str, repo_id: str, rev: str) -> Response:
    repo, head = _at(request, kind, repo_id, rev)
    return paged(
        request,
        [
            {"id": c.id, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
            for c in request.hub.store.history(repo, head)
        ],
    )


@route("POST", "/api/KIND/REPO/branch/REV")
def create_branch(request: Request, kind: str, repo_id: str, rev: str) -> Response:
    start = request.json().get("startingPoint") or "main"
    return _create_ref(request, kind, repo_id, f"refs/heads/{rev}", start)


@route("POST", "/api/KIND/REPO/tag/REV")
def create_tag(request: Request, kind: str, repo_id: str, rev: str) -> Response:
    return _create_ref(request, kind, repo_id, f"refs/tags/{request.json()['tag']}", rev)


def _create_ref(request: Request, kind: str, repo_id: str, ref: str, start: str) -> Response:
    repo, commit = _at(request, kind, repo_id, start)
    request.writer(repo.namespace)
    if ref in repo.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    request.hub.store.set_ref(repo, ref, commit.id)
    return json_response({})


@route("DELETE", "/api/KIND/REPO/(?P<group>branch|tag)/REV")
def delete_ref(request: Request, kind: str, repo_id: str, group: str, rev: str) -> Response:
    repo, _ = _at(request, kind, repo_id, rev)
    request.writer(repo.namespace)
    ref = f"refs/{'heads' if group == 'branch' else 'tags'}/{rev}"
    if ref not in repo.refs:
        raise revision_not_found(rev)
    if ref == "refs/heads/main":
        raise HubError(403, "Cannot delete the default branch")
    request.hub.store.set_ref(repo, ref, None)
    return json_response({})
