"""One push: the plan, all faults before the first byte, each repo in one commit, a receipt for each, the collection.

A receipt is written as soon as its repo is done. The next push compares what the Hub holds with what is staged, and
sends only what differs: a push that was killed goes on where it was, and where nothing changed there is no commit.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hfsd import downloads, hub, hub_write, preflight, staging
from hfsd.errors import BadRequest, HfsdError
from hfsd.hub_write import Head
from hfsd.plain import dumps, from_json
from hfsd.records import Receipt
from hfsd.rundir import read_json, write_atomic
from hfsd.staging import Repo
from hfsd.text import duration, plural, size

RECEIPTS = "receipts.json"
KINDS = {"models": "model", "dataset": "dataset", "space": "space"}  # of --only
SLOW, FAST = 5e6, 100e6  # bytes per second between which most uploads lie
TITLE, TEXT = 60, 150  # characters of a collection's title and description that the Hub takes

Places = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Asked:
    """What a push is told beside what to push and where to.

    `private`: new repos, and the collection, are private. `only`: of `models`, `dataset` and `space`; empty: all.
    `revision`: a branch to commit to; None: main. `create_pr`: propose in pull requests. `force`: overwrite repos that
    somebody else changed. `license`: of original and data, where it is not known. `dry_run`: write the folders and
    the plan, send nothing. `verify`: download what was sent to an empty cache, load it, compare logits.
    """

    private: bool = False
    only: tuple[str, ...] = ()
    revision: str | None = None
    create_pr: bool = False
    force: bool = False
    license: str | None = None
    dry_run: bool = False
    verify: bool = False

    @property
    def branch(self) -> str:
        return self.revision or "main"

    @property
    def collects(self) -> bool:
        """Whether the collection is brought up to date: not where nothing appears on main."""
        return not self.create_pr and self.branch == "main"

    def faults(self) -> list[str]:
        """Options that are unknown or contradict each other."""
        unknown = [o for o in self.only if o not in KINDS]
        faults = [f"--only {','.join(unknown)}: of {', '.join(KINDS)}"] if unknown else []
        if self.create_pr and self.revision:
            faults.append("--create-pr opens pull requests onto main, and --revision names a branch; give one of them")
        return faults


@dataclass(frozen=True)
class Line:
    """One line of the plan. `bytes` are those of all `files`, `sends` those of the files that the Hub lacks."""

    repo: str
    kind: str
    files: int
    bytes: int
    sends: int
    visibility: str
    state: str


@dataclass(frozen=True)
class Pushed:
    """What was planned, and a receipt for each repo that is on the Hub as planned, the collection last."""

    plan: list[Line]
    receipts: list[Receipt]


@dataclass(frozen=True)
class Batch:
    """What is pushed together.

    `repos` are all of them, in the order of their upload; `stage` writes the folder of one into a folder, given where
    the others are. `title` is the collection's; None: there is none. `reading` orders keys in it, with a note each.
    """

    namespace: str
    repos: Sequence[Repo]
    stage: Callable[[Repo, Path, Places], Path]
    out: Path
    message: str
    title: str | None = None
    text: str = ""
    reading: Sequence[tuple[str, str]] = ()
    trust_remote_code: bool = False

    def name(self, repo: Repo) -> str:
        return f"{self.namespace}/{repo.name}"


@dataclass(frozen=True)
class Job:
    """One repo that is to be sent: its folder, the digests of its files, what the Hub holds, our last receipt."""

    repo: Repo
    name: str
    folder: Path
    files: dict[str, str]
    head: Head | None
    receipt: Receipt | None

    @property
    def changed(self) -> list[str]:
        """Paths that the Hub lacks, or holds otherwise."""
        return hub_write.differing(self.folder, self.files, self.head.files if self.head else {})[0]

    @property
    def same(self) -> bool:
        """Whether the Hub holds exactly the folder."""
        return self.head is not None and not any(hub_write.differing(self.folder, self.files, self.head.files))

    @property
    def proposed(self) -> bool:
        """Whether a pull request of an earlier push holds exactly the folder."""
        mine = self.receipt
        return mine is not None and mine.revision.startswith("refs/pr/") and mine.files == self.files


def push(batch: Batch, asked: Asked, faults: Sequence[str] = ()) -> Pushed:
    """Stages, looks at everything, and sends.

    Args:
        faults: what the caller has found wrong.

    Raises:
        BadRequest: every fault, a line each; nothing was sent.
        HfsdError: an upload failed, or the Hub holds something else than what was sent.
    """
    known = receipts(batch.out)
    account, more = preflight.token(batch.namespace, asked.create_pr, asked.collects and batch.title is not None)
    first = [*asked.faults(), *preflight.names([batch.name(r) for r in batch.repos])]
    faults = [*first, *faults, *more]
    if first:  # there is no way to look further
        raise BadRequest("\n".join(faults))
    kinds = [KINDS[o] for o in asked.only] or list(KINDS.values())
    chosen = [r for r in batch.repos if r.kind in kinds]
    faults += _missing_places(batch, chosen, known, asked)
    jobs: list[Job] = []
    for repo in chosen:
        try:
            jobs.append(_job(batch, repo, known, asked, look=account is not None))
        except HfsdError as error:
            faults.append(str(error))
    if asked.create_pr and any(job.head is None for job in jobs):  # nobody can propose to what is not there
        faults += preflight.token(batch.namespace, proposes=False, collects=False)[1]
    for job in jobs:
        faults += [*preflight.secrets(job.folder, list(job.files), job.name), *_clash(job, asked)]
    if faults:
        raise BadRequest("\n".join(dict.fromkeys(faults)))
    plan = [_line(job, asked) for job in jobs]
    if asked.dry_run:
        return Pushed(plan, [])
    print(summary(plan), file=sys.stderr)
    done = [_send(batch, job, known, asked) for job in jobs]
    if batch.title is not None and asked.collects:
        # As private as what it holds: a list of private repos tells their names.
        done.append(_collect(batch, known, any(line.visibility == "private" for line in plan)))
    return Pushed(plan, done)


def receipts(out: Path) -> dict[tuple[str, str, str], Receipt]:
    """The receipts of earlier pushes into this folder, by kind, repo and branch (`pr` for pull requests)."""
    if not (out / RECEIPTS).is_file():
        return {}
    try:
        found = [from_json(Receipt, r) for r in read_json(out / RECEIPTS)]
    except (TypeError, ValueError) as error:
        raise HfsdError(f"{out / RECEIPTS} is damaged ({error}); remove it and push again") from None
    return {_key(r.kind, r.repo, r.revision): r for r in found}


def summary(plan: Sequence[Line]) -> str:
    """How much is to be sent, and about how long that takes."""
    sends = sum(line.sends for line in plan)
    busy = [line for line in plan if line.state in ("new", "changed")]
    if not busy:
        return f"{plural(len(plan), 'repo')}: nothing to send"
    times = " to ".join(duration(sends / rate) for rate in (FAST, SLOW))
    return f"{plural(len(busy), 'repo')} to send, {size(sends)}: {times} at {size(FAST)} to {size(SLOW)} per second"


def table(plan: Sequence[Line]) -> list[list[str]]:
    """The plan as rows, the header first."""
    rows = [["repo", "kind", "files", "size", "to send", "visibility", "state"]]
    for line in plan:
        numbers = [str(line.files), size(line.bytes), size(line.sends)]
        rows.append([line.repo, line.kind, *numbers, line.visibility, line.state])
    return rows


def _key(kind: str, repo: str, revision: str) -> tuple[str, str, str]:
    return kind, repo, "pr" if revision.startswith("refs/pr/") else revision


def _mine(known: Mapping[tuple[str, str, str], Receipt], kind: str, name: str, asked: Asked) -> Receipt | None:
    return known.get((kind, name, "pr" if asked.create_pr else asked.branch))


def _places(batch: Batch, known: Mapping[tuple[str, str, str], Receipt], asked: Asked) -> dict[str, dict[str, Any]]:
    """Where the repos are: at the commit of their receipt; a repo that was not sent yet has none. The Space is left
    out, since no file can name the commit that it is in."""
    found = {}
    for repo in (r for r in batch.repos if r.kind != "space"):
        mine = _mine(known, repo.kind, batch.name(repo), asked)
        found[repo.key] = {"repo": batch.name(repo), "revision": mine.commit if mine else None}
    return found


def _missing_places(
    batch: Batch, chosen: Sequence[Repo], known: Mapping[tuple[str, str, str], Receipt], asked: Asked
) -> list[str]:
    """Models that a Space has to name by their commits, and that are neither sent now nor were before."""
    if not any(r.kind == "space" for r in chosen):
        return []
    lacking = [r for r in batch.repos if r.kind == "model" and r not in chosen]
    names = [batch.name(r) for r in lacking if not _mine(known, r.kind, batch.name(r), asked)]
    return [f"--only: the Space names {n}, which was not pushed yet; push models with it" for n in names]


def _job(
    batch: Batch, repo: Repo, known: Mapping[tuple[str, str, str], Receipt], asked: Asked, look: bool = True
) -> Job:
    name = batch.name(repo)
    folder = batch.stage(repo, batch.out, _places(batch, known, asked))
    head = hub_write.state(name, repo.kind, asked.branch) if look else None
    return Job(repo, name, folder, staging.digests(folder), head, _mine(known, repo.kind, name, asked))


def _clash(job: Job, asked: Asked) -> list[str]:
    """Why a repo that is there must not be overwritten, or is not as private as it should be."""
    head, faults = job.head, []
    if head is None:
        return []
    if asked.private and not head.private:
        faults.append(f"{job.name} is there and public; make it private in its settings, or leave --private out")
    if asked.force or asked.create_pr or job.same or head.revision != asked.branch:
        return faults
    if job.receipt is not None and job.receipt.commit == head.commit:
        return faults
    last = hub_write.last_commit(job.name, job.repo.kind, head.revision)
    if job.receipt is None and last.count == 1 and set(head.files) <= hub_write.FIRST:
        return faults  # made by a push that was killed, or by hand, and empty
    since = "has changed since the last push" if job.receipt else "holds what no push of this folder has sent"
    whose = f"commit {last.commit[:12]} by {last.author} at {last.date}, {last.title!r}"
    return [*faults, f"{job.name} {since}: {whose}; keep it with --revision BRANCH, or overwrite it with --force"]


def _line(job: Job, asked: Asked) -> Line:
    sizes = {path: (job.folder / path).stat().st_size for path in job.files}
    state = "new" if job.head is None else "unchanged" if job.same else "changed"
    if asked.create_pr and job.proposed and state == "changed":
        state = "proposed"
    sends = sum(sizes[path] for path in job.changed) if state in ("new", "changed") else 0
    private = job.head.private if job.head else asked.private
    seen = "private" if private else "public"
    return Line(job.name, job.repo.kind, len(sizes), sum(sizes.values()), sends, seen, state)


def _send(batch: Batch, job: Job, known: dict[tuple[str, str, str], Receipt], asked: Asked) -> Receipt:
    """One repo: its commit, if anything differs, its receipt, and a look at what the Hub then holds."""
    repo, name = job.repo, job.name
    if repo.kind == "space":  # it names the commits that were made just now
        folder = batch.stage(repo, batch.out, _places(batch, known, asked))
        job = replace(job, folder=folder, files=staging.digests(folder))
    if asked.create_pr and job.proposed and not job.same:
        receipt = job.receipt
        assert receipt is not None
    else:
        receipt = _commit(batch, job, asked)
        known[_key(repo.kind, name, receipt.revision)] = receipt
        write_atomic(batch.out / RECEIPTS, dumps(list(known.values())))
    there = hub.files(name, repo.kind, receipt.commit)
    wrong, extra = hub_write.differing(job.folder, job.files, there)
    if wrong or extra:
        what = f"{wrong[0]} is not what was sent" if wrong else f"it holds {extra[0]}, which was not sent"
        raise HfsdError(f"{name} at {receipt.commit[:12]}: {what}; push again")
    if asked.verify:
        said = downloads.check(receipt, job.folder, trust_remote_code=batch.trust_remote_code)
        print(f"verified {name}: {said}", file=sys.stderr)
    return receipt


def _commit(batch: Batch, job: Job, asked: Asked) -> Receipt:
    repo, name, head = job.repo, job.name, job.head
    head = head or hub_write.create(name, repo.kind, asked.private)
    if not asked.create_pr and head.revision != asked.branch:
        hub_write.branch(name, repo.kind, asked.branch, head.commit)
    job = replace(job, head=head)
    if job.same:
        page = hub_write.page(name, repo.kind, asked.branch)
        return Receipt(name, repo.kind, head.commit, page, job.files, asked.branch)
    changed = job.changed
    amount = size(sum((job.folder / path).stat().st_size for path in changed))
    what = f"{repo.kind} {name}: {len(changed)} of {len(job.files)} files, {amount}"
    print(f"uploading {what}", file=sys.stderr, flush=True)
    message = f"{batch.message}: {repo.key}"
    made = hub_write.commit(job.folder, job.files, name, repo.kind, head, asked.branch, message, asked.create_pr)
    return Receipt(name, repo.kind, made.commit, made.url, job.files, made.revision)


def _collect(batch: Batch, known: dict[tuple[str, str, str], Receipt], private: bool) -> Receipt:
    """The collection of all that is on main, in reading order; its receipt keeps its slug."""
    title = str(batch.title)[:TITLE]
    repos = {r.key: r for r in batch.repos}
    items = []
    for key, note in batch.reading:
        repo = repos.get(key)
        if repo and (repo.kind, batch.name(repo), "main") in known:
            items.append((batch.name(repo), repo.kind, note))
    slug = next((r.repo for r in known.values() if r.kind == "collection"), None)
    found, url = hub_write.collect(batch.namespace, title, batch.text[:TEXT], items, private, slug)
    for earlier in [k for k in known if k[0] == "collection"]:
        del known[earlier]
    receipt = Receipt(found, "collection", hashlib.sha256(dumps(items).encode()).hexdigest(), url)
    known[_key("collection", found, "main")] = receipt
    write_atomic(batch.out / RECEIPTS, dumps(list(known.values())))
    return receipt
