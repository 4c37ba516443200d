"""A family on the loopback Hub, loaded by any of its names; families listed, and the records of a run fetched."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hfsd import loading, pipeline
from hfsd.cli import app
from tests.hub import hub_env, run_client
from tests.hub.server import LoopbackHub
from tests.test_loading import MERGED, SELF, SFT, STEM

DATA = "gsm-symbolic-rewritten-by-tiny-llama"


PUSH = """
from pathlib import Path
from hfsd import pipeline
receipts = pipeline.push(Path({root!r}), "tester", license="mit")
(slug,) = [r.repo for r in receipts if r.kind == "collection"]
print("SLUG", slug)
"""


@pytest.fixture(scope="module")
def pushed(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LoopbackHub, str]]:
    """A Hub that holds the family of the tiny run, and the slug of its collection."""
    home = tmp_path_factory.mktemp("loading")
    root = Path(shutil.copytree(tiny_run, home / "tiny", copy_function=shutil.copy2))
    with LoopbackHub(home / "hub", users={"hf_loopback": "tester"}) as hub:
        said = run_client(PUSH.format(root=str(root)), hub_env(hub, "hf_loopback", home / "home"), timeout=300)
        yield hub, said.split("SLUG ")[1].split()[0]


LOAD = """
import torch
from pathlib import Path
from huggingface_hub import HfApi, snapshot_download
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM
import hfsd
from hfsd import loading
ids = torch.arange(24)[None]
def logits(model):
    with torch.inference_mode():
        return model(ids).logits
expected = {{v: logits(AutoModelForCausalLM.from_pretrained(f)) for v, f in {folders!r}.items()}}
for name in {names!r}:
    family = hfsd.load_family(name)
    assert family.ids == {ids!r}, (name, family.ids)
    for variant, wanted in expected.items():
        with family.use(variant) as model:
            assert torch.allclose(logits(model), wanted, atol=1e-4), (name, variant)
for name in {others!r}:
    assert loading.find(name).file.shared == family.file.shared, name
# PEFT finds the pruned repo by itself, for an adapter in a repo of its own: it looks for `subfolder` in the base too
api = HfApi(token="hf_loopback")
api.create_repo("tester/alone")
adapter = Path(snapshot_download("tester/{stem}-{arm}", allow_patterns="adapter/*")) / "adapter"
api.upload_folder(repo_id="tester/alone", folder_path=adapter)
tuned = AutoPeftModelForCausalLM.from_pretrained("tester/alone")
assert torch.allclose(logits(tuned), expected[{arm!r}], atol=1e-4)
print("LOADED")
"""


def test_every_name_loads_the_family(
    pushed: tuple[LoopbackHub, str], tiny_run: Path, model_folder: Path, tmp_path: Path
) -> None:
    hub, slug = pushed
    space, page = f"tester/{STEM}-compare", f"{hub.endpoint}/tester/{STEM}-{SELF}/tree/main"
    names = {
        "names": [f"tester/{STEM}", space, f"tester/{DATA}", slug, "tester/tiny-llama-original", page],
        "others": [f"tester/{STEM}-{SFT}", f"datasets/tester/{DATA}", f"{hub.endpoint}/spaces/{space}"],
        "folders": {"original": str(model_folder)} | {v: str(tiny_run / folder) for v, folder in MERGED.items()},
        "ids": ["original", "pruned", *sorted([SFT, SELF])],
    }
    names["others"].append(f"{hub.endpoint}/collections/{slug}")
    before = len(hub.calls)
    code = LOAD.format(**names, stem=STEM, arm=SELF)
    assert "LOADED" in run_client(code, hub_env(hub, None, tmp_path / "home"), timeout=300)
    # Only the original's weights came, and the adapters.
    calls = [c.path for c in hub.calls[before:]]
    calls = calls[: next(i for i, path in enumerate(calls) if "/repos/create" in path)]
    weights = {path.split("/resolve/")[0] for path in calls if path.endswith("/model.safetensors")}
    assert weights == {"/tester/tiny-llama-original"}
    assert not hub.strays()


FIND = """
import json
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download
from typer.testing import CliRunner
from hfsd import familyfile, listing, loading, shards
from hfsd.cli import app
from hfsd.errors import HfsdError
root, api = Path({root!r}), HfApi()
def said(call, *args):
    try:
        return call(*args)
    except HfsdError as error:
        return str(error)
listed = CliRunner().invoke(app, ["list", "tester", "--json"]).output.splitlines()
print("LIST", listed[0])
(line,) = json.loads(listed[-1])["families"]
assert (line["removed"], line["n_layers"], line["arms"]) == (2, 6, {arms!r})
print("NOBODY", said(listing.families, "nobody"))
print("PULLED", CliRunner().invoke(app, ["pull", "tester/{stem}-{sft}", "--out", str(root / "pulled")]).output)
print("AGAIN", said(listing.pull, "tester/{stem}", root / "pulled"))
print("NONE", said(loading.find, "tester/nothing"))
# the Space's file names commits, and finds its repos at them
space = loading.find("tester/{stem}-compare").file
assert space.original.revision and space.records.revision and all(p.revision for p in space.adapters.values())
assert loading.find("tester/{stem}").file.adapters[{sft!r}].revision is None
# an original that was overwritten: refused by its newest commit, good at the one that the Space names
good = Path(hf_hub_download("tester/tiny-llama-original", "model.safetensors")).read_bytes()
tensor = next(t for t in shards.read(Path({original!r})) if t.name.startswith("model.layers.0.mlp"))
bad = good[:tensor.start] + bytes([good[tensor.start] ^ 1]) + good[tensor.start + 1:]
def overwrite(data):
    api.upload_file(path_or_fileobj=data, path_in_repo="model.safetensors", repo_id="tester/tiny-llama-original")
overwrite(bad)
print("OVERWRITTEN", said(loading.load_family, "tester/{stem}"))
found = loading.find("tester/{stem}-compare")
assert familyfile.differing(found.file, found.folder(found.file.original)) == []
overwrite(good)
# a second family with the same original
file = json.loads(Path(hf_hub_download("tester/{stem}", "family.json")).read_text())
file["repos"]["pruned"] = "tester/other"
card = "---\\ntags: [hfsd, layer-pruning]\\nbase_model: tester/tiny-llama-original\\n---\\n"
def push_other(**changes):
    text = json.dumps(file | changes)
    adds = [CommitOperationAdd("family.json", text.encode()), CommitOperationAdd("README.md", card.encode())]
    api.create_commit("tester/other", adds, commit_message="other")
api.create_repo("tester/other")
push_other()
api.create_repo("tester/single")  # a checkpoint that was pushed by itself
api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="tester/single")
api.add_collection_item({slug!r}, "tester/other", "model")
listed = listing.families("tester")
assert [line.pruned for line in listed] == ["tester/other", "tester/single", "tester/{stem}"]
print("SINGLE", listed[1].sentence)
api.delete_repo("tester/single")
print("SEVERAL", said(loading.find, {slug!r}))
print("ORIGINAL", said(loading.find, "tester/tiny-llama-original"))
push_other(original={{"path": "../../elsewhere"}})
print("PATH", said(loading.find, "tester/other"))
api.delete_repo("tester/other")
"""


def test_families_are_listed_and_their_records_fetched(
    pushed: tuple[LoopbackHub, str], tiny_run: Path, model_folder: Path, tmp_path: Path
) -> None:
    hub, slug = pushed
    names = {"root": str(tmp_path), "stem": STEM, "sft": SFT, "slug": slug, "original": str(model_folder)}
    code = FIND.format(**names, arms=sorted([SFT, SELF]))
    out = run_client(code, hub_env(hub, "hf_loopback", tmp_path / "home"))
    said = dict(line.split(" ", 1) for line in out.splitlines() if line)
    assert said["LIST"].startswith(f"tester/{STEM}: tester/tiny-llama-original, less 2 of its 6 blocks")
    assert SFT in said["LIST"]
    assert "nobody: the Hub shows no model there" in said["NOBODY"]
    assert "is there already" in said["AGAIN"] and "no family.json there" in said["NONE"]
    assert "the records are in" in said["PULLED"]
    assert "block 0 of tester/tiny-llama-original is not what the pruned model was cut from" in said["OVERWRITTEN"]
    assert said["SINGLE"] == "tester/single: tester/tiny-llama-original; pushed by itself, see its card"
    for several in ("SEVERAL", "ORIGINAL"):
        assert f"several families: give one of tester/other, tester/{STEM}" in said[several]
    assert "a family on the Hub names repos only; refused" in said["PATH"]
    root = tmp_path / "pulled"
    assert pipeline.results(root).tasks == pipeline.results(tiny_run).tasks
    assert (root / "report" / "index.html").is_file() and (root / "recipe.yaml").is_file()
    assert loading.find(root).file.repos["pruned"] == f"tester/{STEM}"
    done = CliRunner().invoke(app, ["report", str(root)])
    assert done.exit_code == 0 and f'hfsd.load_family("{root}")' in done.output.replace("\n", "")
