"""`hfsd push` of a run and of a checkpoint cut by hand: what is looked at, what is sent, and where no token appears."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from hfsd import pipeline, preflight, prune
from hfsd.cards import validate
from hfsd.errors import BadRequest
from hfsd.records import ModelRef, PrunePlan
from tests import tiny
from tests.hub import hub_env, run_client
from tests.hub.server import LoopbackHub

TOKEN = "hf_PlantedTokenThatNobodyMaySee0123456789"
SFT = "sft-gsm-symbolic"
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", {TOKEN: "tester"}) as hub:
        yield hub
    assert not hub.strays()


@pytest.fixture
def command(hub: LoopbackHub, tmp_path: Path) -> Iterator[Command]:
    """Runs `hfsd` with the planted token, and in the end looks for it in every byte that was written."""
    said = []

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "hfsd", *words]
        env = hub_env(hub, TOKEN, tmp_path / "home")
        done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300, check=False)
        said.append(done.stdout + done.stderr)
        return done

    yield run
    assert said and not any(TOKEN[3:] in text for text in said)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 20
    assert not [p for p in files if TOKEN[3:].encode() in p.read_bytes()]


@pytest.fixture
def root(tiny_run: Path, tmp_path: Path) -> Path:
    """A run directory of the test's own."""
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))


def _publish(root: Path, **fields: str | bool) -> None:
    """Changes the publish block of a finished run."""
    recipe = yaml.safe_load((root / "recipe.yaml").read_text())
    recipe["publish"] |= fields
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def test_a_run_is_planned_checked_pushed_and_verified(root: Path, hub: LoopbackHub, command: Command) -> None:
    unknown = command("push", str(root), "--to", "tester", "--dry-run")
    assert unknown.returncode == 2
    assert unknown.stderr.splitlines() == [
        "hfsd: the license of the data set gym:gsm_symbolic is not known: find it out, and state it with --license ID "
        "or in the recipe"
    ]
    names = ("{prefix}-less{n}", "repo")
    _publish(root, names=names[0], adapter=names[1])
    planned = command("push", str(root), "--to", "tester", "--license", "mit", "--dry-run", "--json")
    assert planned.returncode == 0, planned.stderr
    closing = json.loads(planned.stdout.splitlines()[-1])
    sent = [line["repo"].removeprefix("tester/") for line in closing["plan"]]
    stem = "tiny-llama-less2"
    arms = [f"{stem}-{arm}-gsm-symbolic{tail}" for arm in ("sft", "self-distilled") for tail in ("", "-adapter")]
    assert sent == ["gsm-symbolic-rewritten-by-tiny-llama", "tiny-llama-original", stem, *arms, f"{stem}-compare"]
    assert "8 repos to send" in planned.stdout and " unchanged " not in planned.stdout
    assert not [call for call in hub.calls if call.method in ("POST", "PUT") and "validate" not in call.path]
    adapter = root / "push" / "tester" / f"{stem}-{SFT}-adapter"
    card = (adapter / "README.md").read_text()
    assert validate(card) == [] and "base_model_relation: adapter" in card and f"base_model: tester/{stem}" in card
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == f"tester/{stem}"
    assert not (adapter.parent / f"{stem}-{SFT}" / "adapter").exists()

    pushed = command("push", str(root), "--to", "tester", "--license", "mit", "--verify", "--debug")
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stderr.count("loads, logits within") == 4 and pushed.stderr.count("files as sent\n") == 4
    assert "8 repos to send" in pushed.stderr and "collection http" in pushed.stdout
    family = json.loads((root / "push" / "tester" / f"{stem}-compare" / "family.json").read_text())
    place = family["adapters"][SFT]
    assert place["repo"] == f"tester/{stem}-{SFT}-adapter" and len(place["revision"]) == 40 and not place["subfolder"]
    gone = command("push", str(root), "--to", "elsewhere", "--license", "mit", "--debug")
    assert gone.returncode == 1 and "Traceback" in gone.stderr and "no member of it" in gone.stderr


def test_a_run_that_is_not_as_recorded_is_not_pushed(root: Path, hub: LoopbackHub, command: Command) -> None:
    weights = root / "prune" / "checkpoint" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (root / "evaluate" / "pruned" / "DONE.json").unlink()
    rewrites = root / "rewrite" / "rewrites.jsonl"
    rewrites.write_text(rewrites.read_text().replace('"text": "', f'"text": "{TOKEN} ', 1))
    done = command("push", str(root), "--to", "tester", "--license", "cc-by-nd-4.0")
    assert done.returncode == 2
    told = [line.removeprefix("hfsd: ") for line in done.stderr.splitlines()]
    for part in (
        f"{weights} has changed since prune was finished; make it again: hfsd run {root / 'recipe.yaml'} --out {root} "
        "--redo prune",
        f"evaluate/pruned is not finished in {root}; finish it with `hfsd run`",
        "the data set gym:gsm_symbolic is under cc-by-nd-4.0, which allows no derivatives to be shared",
        "tester/gsm-symbolic-rewritten-by-tiny-llama: rewrites.jsonl holds what looks like a Hugging Face token; "
        "take it out where it came from, and run again",
    ):
        assert part in told, told
    assert not [call for call in hub.calls if call.method in ("POST", "PUT")]
    rewrites.unlink()  # the fixture looks for what was planted
    shutil.rmtree(root / "push")


def test_a_checkpoint_cut_by_hand_is_pushed_by_itself(
    model_folder: Path, tmp_path: Path, hub: LoopbackHub, command: Command
) -> None:
    cut = tmp_path / "cut"
    prune.run(model_folder, ModelRef("tester/whole", "a" * 40), PrunePlan(6, (0, 1, 4, 5), "by hand"), cut, "structure")
    code = """
    from huggingface_hub import HfApi
    api = HfApi()
    api.create_repo("tester/whole", private=True)
    card = b"---\\nlicense: other\\nlicense_name: tiny\\nlicense_link: https://example.com\\n---\\n"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id="tester/whole")
    print(api.model_info("tester/whole").sha)
    """
    commit = run_client(code, hub_env(hub, TOKEN, tmp_path / "home")).strip()
    provenance = (cut / "hfsd.json").read_text()
    (cut / "hfsd.json").write_text(provenance.replace("a" * 40, commit))
    with pytest.raises(BadRequest, match="--to tester: name the repo of a single checkpoint, as tester/cut"):
        pipeline.push(cut, "tester")
    with pytest.raises(BadRequest, match="neither a finished run nor a checkpoint of `hfsd prune`"):
        pipeline.push(model_folder, "tester/whole")
    (cut / "pytorch_model.bin").write_bytes(b"\x80")
    assert "pytorch_model.bin is a pickle" in preflight.pickles(cut)[0]
    (cut / "pytorch_model.bin").unlink()
    hub.fault("POST", "/commit/", "status", status=403)
    failed = command("push", str(cut), "--to", "tester/cut", "--debug")
    assert failed.returncode == 1 and "HfHubHTTPError" in failed.stderr and "Hub answered 403" in failed.stderr
    done = command("push", str(cut), "--to", "tester/cut")
    assert done.returncode == 0, done.stderr
    card = (cut / "push" / "tester" / "cut" / "README.md").read_text()
    assert validate(card) == []
    for part in ("license_name: tiny", "base_model: tester/whole", "without blocks \\[2, 4) of 6", "by hand"):
        assert part in card, card
    again = command("push", str(cut), "--to", "tester/cut")
    assert "1 repo: nothing to send" in again.stderr
    assert len([c for c in hub.calls if "/api/models/tester/cut/commit/" in c.path and c.status == 200]) == 1


def test_secrets_are_found_across_parts_and_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow
    from pyarrow import parquet

    monkeypatch.setattr("hfsd.preflight.CHUNK", 300)
    monkeypatch.setattr("hfsd.hub.token", lambda: None)
    for at in range(280, 300):
        (tmp_path / "a.txt").write_bytes(b" " * at + TOKEN.encode() + b" " * 500)
        assert len(preflight.secrets(tmp_path, ["a.txt"], "repo")) == 1
    rows = [{"prompt": [{"role": "user", "content": f"my key is {TOKEN}"}]}, {"prompt": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet", compression="zstd")
    (fault,) = preflight.secrets(tmp_path, ["b.parquet"], "repo")
    assert fault.startswith("repo: b.parquet holds what looks like a Hugging Face token") and TOKEN not in fault


def test_a_run_that_names_a_namespace_ends_on_the_hub(root: Path, hub: LoopbackHub, tmp_path: Path) -> None:
    _publish(root, to="tester", private=True)
    code = f"""
    from pathlib import Path
    from hfsd import fetch, publish, recipes
    root = Path({str(root)!r})
    recipe = recipes.parse((root / "recipe.yaml").read_text(), "recipe", ["data.license=mit"])
    done = publish.run(recipe, root, fetch.resolve(recipe.model), root / "publish")
    assert [r.kind for r in done] == ["dataset", *["model"] * 4, "space", "collection"]
    """
    run_client(code, hub_env(hub, TOKEN, tmp_path / "home"))
    assert len([c for c in hub.calls if "/commit/" in c.path]) == 6
    assert all(repo.meta["private"] for repo in hub.store.repos("models", "tester"))
    assert "license: mit" in (root / "publish" / "gsm-symbolic-rewritten-by-tiny-llama" / "README.md").read_text()


def test_licenses_are_asked_for_where_a_repo_is_gated_or_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    cards: dict[str, tuple[dict[str, str], bool]] = {
        "org/open": ({"license": "mit"}, False),
        "org/gated": ({"license": "llama3.1"}, True),
        "org/silent": ({}, False),
        "org/closed": ({"license": "cc-by-nc-nd-4.0"}, False),
    }
    monkeypatch.setattr("hfsd.hub.card_facts", lambda repo, kind, revision: cards[repo])

    def found(repo: str, stated: str | None = None, given: str | None = None) -> tuple[str | None, str]:
        known = preflight.license_of(repo, stated, (repo, "model", None), given)
        return known.facts.get("license"), known.fault or ""

    assert found("org/open") == ("mit", "") and found("org/open", given="gpl") == ("mit", "")
    assert found("org/gated")[1].startswith("org/gated is gated: read its terms (llama3.1)")
    assert found("org/gated", given="llama3.1") == ("llama3.1", "")
    assert "is not known" in found("org/silent")[1] and found("org/silent", given="mit") == ("mit", "")
    assert "allows no derivatives" in found("org/closed")[1] and found("org/closed", "mit") == ("mit", "")


def test_a_recipe_that_publishes_is_asked_for_licenses_before_it_runs(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hfsd.hub.profile", lambda: {"name": "tester"})
    with pytest.raises(BadRequest) as caught:
        pipeline.preflight(tiny.recipe(model_folder, publish__to="lab"))
    told = str(caught.value).splitlines()
    assert told[0].startswith("publish: --to lab: tester is no member of it")
    assert told[1].startswith("publish: the license of the data set gym:gsm_symbolic is not known")


def test_room_is_needed_only_on_another_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "a").write_bytes(bytes(5000))
    assert preflight.room([tmp_path / "weights"], tmp_path / "out") == []
    monkeypatch.setattr("hfsd.disk.free", lambda place: 4000)
    elsewhere = Path("/dev/shm")
    if elsewhere.is_dir() and elsewhere.stat().st_dev != tmp_path.stat().st_dev:
        (fault,) = preflight.room([tmp_path / "weights"], elsewhere / "out")
        assert "need 5 kB in /dev/shm, which has 4 kB free" in fault
