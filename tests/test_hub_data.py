"""Reading a dataset of the Hub: whole, in part, at a revision, and what is said where that cannot be."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.hub import hub_env, run_client
from tests.hub.server import Call, LoopbackHub

REPO, LINES = "tester/problems", "tester/lines"
README = """---
configs:
- config_name: main
  data_files:
  - {split: train, path: main/train-*}
  - {split: test, path: main/test-*}
- config_name: turns
  data_files: [{split: train, path: turns/train-*}]
---
"""
TURNS = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
Pair = list[str]


def _rows(seed: str, count: int) -> list[dict[str, str]]:
    """Rows of GSM8K's shape and size, no two alike, that hardly compress."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(5000)]

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    return [{"question": f"{seed} {i}: {text(40)}?", "answer": f"{text(50)}\n#### {i}"} for i in range(count)]


def _write(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=500)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@dataclass
class Stored:
    """Two datasets on a loopback Hub, one of parquet and one of JSON lines, with the same rows in two commits each."""

    hub: LoopbackHub
    commits: list[str]  # of REPO
    pairs: dict[tuple[int, str], list[Pair]]  # (commit, split) -> prompts and references of the configuration main

    def fetched(self, repo: str, calls: list[Call]) -> dict[str, int]:
        """Bytes that were sent of each file of a repo's main branch."""
        store = self.hub.store
        files = store.resolve(store.repo("datasets", repo, None), "main").files
        blobs = {f"/blobs/{entry.sha256}": path for path, entry in files.items()}
        found: Counter[str] = Counter()
        for call in calls:
            found[blobs.get(call.path) or call.path.partition("/resolve/")[2].partition("/")[2]] += call.sent
        return {path: found[path] for path in files if found[path]}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stored]:
    folder = tmp_path_factory.mktemp("hub")
    upload = """
    from huggingface_hub import HfApi
    api = HfApi()
    for repo, folder in {folders}.items():
        api.create_repo(repo, repo_type="dataset", exist_ok=True)
        print(api.upload_folder(repo_id=repo, repo_type="dataset", folder_path=folder).oid)
    """
    folders = {REPO: str(folder / "parquet"), LINES: str(folder / "jsonl")}
    with LoopbackHub(folder / "root") as hub:
        made = Stored(hub, [], {})
        for commit in range(2):
            rows = {split: _rows(f"{split} {commit}", n) for split, n in (("train", 4000), ("test", 50))}
            for suffix in ("parquet", "jsonl"):
                up = folder / suffix
                _write(rows["train"][:2000], up / f"main/train-00000-of-00002.{suffix}")
                _write(rows["train"][2000:], up / f"main/train-00001-of-00002.{suffix}")
                _write(rows["test"], up / f"main/test-00000-of-00001.{suffix}")
                _write([{"messages": TURNS}], up / f"turns/train-00000-of-00001.{suffix}")
                (up / "README.md").write_text(README)
            env = hub_env(hub, "hf_loopback", folder / "home")
            made.commits.append(run_client(upload.format(folders=folders), env).split()[0])
            made.pairs |= {(commit, s): [[r["question"], r["answer"]] for r in found] for s, found in rows.items()}
        yield made
    assert not [call for call in hub.calls if call.status == 501], "the client made a call that has no route"
    assert not [call for call in hub.strays() if "//datasets-server." not in call.path]


READ = """
import json
from hfsd import data
from hfsd.errors import HfsdError
from hfsd.blocks_cut import Data
for asked in json.loads({asked!r}):
    try:
        print(json.dumps([[e.prompt, e.reference] for e in data.load(Data(**asked))]))
    except HfsdError as error:
        print(type(error).__name__, error)
"""


def _read(env: dict[str, str], *asked: dict[str, Any]) -> list[Any]:
    """What data.load gives for each: pairs of prompt and reference, or the error in words; in one new process."""
    code = READ.format(asked=json.dumps([{"source": REPO, **one} for one in asked]))
    lines = run_client(code, env).splitlines()
    assert len(lines) == len(asked), lines  # so an error is one line
    return [json.loads(line) if line.startswith("[") else line for line in lines]


@pytest.mark.parametrize("repo", [REPO, LINES])
def test_whole_by_configuration_and_split(stored: Stored, tmp_path: Path, repo: str) -> None:
    asked = [{"config": c, "split": s} for c, s in (("main", "train"), ("main", "test"), ("turns", "train"))]
    found = _read(hub_env(stored.hub, None, tmp_path), *({"source": repo, **one} for one in asked))
    assert found == [stored.pairs[1, "train"], stored.pairs[1, "test"], [[m["content"] for m in TURNS]]]


def test_a_pinned_commit_is_read_whatever_came_later_or_was_cached(stored: Stored, tmp_path: Path) -> None:
    env = hub_env(stored.hub, None, tmp_path)
    main = {"config": "main", "split": "test"}
    first, second = ({**main, "revision": commit} for commit in stored.commits)
    old, new = stored.pairs[0, "test"], stored.pairs[1, "test"]
    assert _read(env, main, first, second, first, {**first, "streaming": True}) == [new, old, new, old, old]

    # Without the Hub, the cache gives the rows that it holds, and cannot say of which commit they are.
    cached, pinned, absent = _read(env | {"HF_HUB_OFFLINE": "1"}, main, second, {"source": "tester/other"})
    assert cached in (old, new)
    assert pinned == (
        f"HfsdError dataset {REPO} (config main, split test, revision {stored.commits[1]}): "
        "the Hub cannot be reached, and the cache does not tell revisions apart"
    )
    assert absent == "HfsdError dataset tester/other (split train): the Hub cannot be reached (ConnectionError)"


@pytest.mark.parametrize("repo", [REPO, LINES])
def test_streaming_fetches_the_first_rows_and_not_the_rest(stored: Stored, tmp_path: Path, repo: str) -> None:
    env = hub_env(stored.hub, None, tmp_path)
    before = len(stored.hub.calls)
    (first,) = _read(env, {"source": repo, "config": "main", "streaming": True, "pool": 300})
    streamed = stored.fetched(repo, stored.hub.calls[before:])
    before = len(stored.hub.calls)
    (whole,) = _read(env, {"source": repo, "config": "main"})
    fetched = stored.fetched(repo, stored.hub.calls[before:])
    assert whole == stored.pairs[1, "train"] and first == whole[:300]
    test, shard, other = sorted(fetched)
    assert "test-00000" in test and min(fetched[shard], fetched[other]) > 900_000
    assert sorted(streamed) == ["README.md", shard]


@pytest.mark.parametrize("pool", [2000, 9999])
def test_streaming_may_end_with_a_file_or_with_all_of_them(stored: Stored, tmp_path: Path, pool: int) -> None:
    before = len(stored.hub.calls)
    asked = {"config": "main", "streaming": True, "pool": pool}
    (found,) = _read(hub_env(stored.hub, None, tmp_path), asked)
    assert found == stored.pairs[1, "train"][:pool]
    shards = [name for name in stored.fetched(REPO, stored.hub.calls[before:]) if "train" in name]
    assert len(shards) == (1 if pool == 2000 else 2)


WRONG = {
    "repo": ({"source": "tester/none"}, "dataset tester/none (split train)", "doesn't exist on the Hub"),
    "config": ({"config": "man"}, f"dataset {REPO} (config man, split train)", "['main', 'turns']"),
    "no config": ({}, f"dataset {REPO} (split train)", "pick one among the available configs: ['main', 'turns']"),
    "split": ({"config": "main", "split": "trian"}, f"dataset {REPO} (config main, split trian)", "['train', 'test']"),
    "revision": (
        {"config": "main", "revision": "v9"},
        f"dataset {REPO} (config main, split train, revision v9)",
        "Revision 'v9' doesn't exist",
    ),
}


def test_what_is_not_there_is_told_in_one_line(stored: Stored, tmp_path: Path) -> None:
    asked = [{**fields, "streaming": streaming} for fields, _, _ in WRONG.values() for streaming in (False, True)]
    told = _read(hub_env(stored.hub, None, tmp_path), *asked)
    for line, (_, received, why) in zip(told, [w for w in WRONG.values() for _ in range(2)], strict=True):
        assert line.startswith(f"BadRequest {received}: ") and why in line, line
        assert line.endswith(
            "; check data.source, data.config, data.split and data.revision, or run `hf auth login` if it is private"
        )


def test_files_that_are_no_rows_are_told_in_one_line(stored: Stored, tmp_path: Path) -> None:
    files = {
        "torn": ("rows.jsonl", '{"question": "a", "answer": "b"}\n{"quest', "JSON parse error"),
        "script": ("script.py", "", "Dataset scripts are no longer supported, but found script.py"),
        "nothing": ("README.md", "# Nothing", "doesn't contain any data files"),
    }
    upload = f"""
    from huggingface_hub import HfApi
    for name, (file, text, _) in {files}.items():
        HfApi().create_repo(f"tester/{{name}}", repo_type="dataset")
        HfApi().upload_file(
            repo_id=f"tester/{{name}}", repo_type="dataset", path_in_repo=file, path_or_fileobj=text.encode()
        )
    """
    env = hub_env(stored.hub, "hf_loopback", tmp_path)
    run_client(upload, env)
    told = _read(env, *({"source": f"tester/{name}", "streaming": s} for name in files for s in (False, True)))
    for line, name in zip(told, [name for name in files for _ in range(2)], strict=True):
        assert line.startswith(f"BadRequest dataset tester/{name} (split train): ") and files[name][2] in line, line


def test_the_command_says_it_too(stored: Stored, model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hfsd", "scan", str(model_folder), "--calibration", REPO]
    command += ["--out", str(tmp_path / "scores"), "--set", "data.config=main", "--set", "data.split=trian"]
    env = hub_env(stored.hub, None, tmp_path / "home")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "dataset" in line]
    assert line.startswith(f"hfsd: dataset {REPO} (config main, split trian): ") and "['train', 'test']" in line
