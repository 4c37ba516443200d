"""What publish stages and uploads, and the round trip over the loopback Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from hfsd import cards, staging
from hfsd.plain import from_json
from hfsd.records import Receipt
from hfsd.rundir import sha256
from tests.hub import hub_env, run_client
from tests.hub.server import LoopbackHub

STEM = "tiny-llama-pruned2"
MODELS = ["tiny-llama-original", STEM, f"{STEM}-sft-gsm-symbolic", f"{STEM}-self-distilled-gsm-symbolic"]


def test_the_folders_are_what_an_upload_sends(tiny_run: Path) -> None:
    folder = tiny_run / "publish"
    receipts = [from_json(Receipt, r) for r in json.loads((folder / "receipts.json").read_text())]
    assert [r.repo for r in receipts] == ["gsm-symbolic-rewritten-by-tiny-llama", *MODELS, f"{STEM}-compare"]
    for receipt in receipts:
        there = {
            p.relative_to(folder / receipt.repo).as_posix() for p in (folder / receipt.repo).rglob("*") if p.is_file()
        }
        assert there == set(receipt.files)
        assert all(sha256(folder / receipt.repo / name) == digest for name, digest in receipt.files.items())
        assert cards.validate((folder / receipt.repo / "README.md").read_text()) == []


def test_weights_are_linked_and_adapters_point_at_the_pruned_repo(tiny_run: Path) -> None:
    merged = tiny_run / "publish" / MODELS[3]
    own = tiny_run / "train" / "self-distilled-gsm-symbolic" / "merged" / "model.safetensors"
    assert (merged / "model.safetensors").samefile(own)
    config = json.loads((merged / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == STEM


def test_only_a_models_own_files_are_published() -> None:
    ours = ["config.json", "model-00001-of-00002.safetensors", "tokenizer.model", "LICENSE.txt", "NOTICE"]
    assert all(map(staging._is_a_models, ours))
    assert not any(map(staging._is_a_models, [".env", ".lock", "README.md", "notes.md", "id_rsa", "optimizer.pt"]))


def test_no_file_names_this_machine(tiny_run: Path, model_folder: Path) -> None:
    for path in (tiny_run / "publish").rglob("*"):
        if path.suffix in (".json", ".md", ".jsonl", ".txt", ".jinja"):
            assert str(model_folder.parent) not in path.read_text(), path


PUSH = """
from pathlib import Path
from hfsd import pipeline
for r in pipeline.push(Path({root!r}), "tester", license="mit"):
    print(r.kind, r.repo, r.commit)
"""

LOAD = """
import json, sys, torch
from pathlib import Path
from datasets import load_dataset
from huggingface_hub import ModelCard
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
root = Path({root!r})
ids = torch.arange(24)[None]
def logits(model):
    with torch.inference_mode():
        return model(ids).logits
places = {{
    "tester/tiny-llama-original": {original!r},
    "tester/{stem}": root / "prune/checkpoint",
    "tester/{stem}-sft-gsm-symbolic": root / "train/sft-gsm-symbolic/merged",
    "tester/{stem}-self-distilled-gsm-symbolic": root / "train/self-distilled-gsm-symbolic/merged",
}}
for repo, place in places.items():
    pushed = AutoModelForCausalLM.from_pretrained(repo)
    assert torch.equal(logits(pushed), logits(AutoModelForCausalLM.from_pretrained(place))), repo
    assert AutoTokenizer.from_pretrained(repo).chat_template
    card = ModelCard.load(repo)
    card.validate()
    assert card.data.library_name == "transformers" and "hfsd" in card.data.tags
    if repo != "tester/tiny-llama-original":
        assert card.data.base_model.startswith("tester/tiny-llama-") and card.data.eval_results
repo = "tester/{stem}-self-distilled-gsm-symbolic"
base = AutoModelForCausalLM.from_pretrained("tester/{stem}")
tuned = PeftModel.from_pretrained(base, repo, subfolder="adapter")
assert tuned.peft_config["default"].base_model_name_or_path == "tester/{stem}"
assert torch.allclose(logits(tuned), logits(AutoModelForCausalLM.from_pretrained(repo)), atol=1e-4)
data = "tester/gsm-symbolic-rewritten-by-tiny-llama"
sets = {{c: load_dataset(data, c, split="train") for c in ("reference", "self-distilled")}}
assert sets["reference"]["id"] == sets["self-distilled"]["id"] and len(sets["reference"]) == 12
assert sets["reference"][0]["prompt"][0]["role"] == "user"
print("ROUND TRIP")
"""


def test_round_trip_over_the_hub(tiny_run: Path, model_folder: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    with LoopbackHub(tmp_path / "hub", users={"hf_loopback": "tester"}) as hub:
        push = PUSH.format(root=str(root))
        first = run_client(push, hub_env(hub, "hf_loopback", tmp_path / "home1"), timeout=300)
        pushed = dict(line.split()[1:] for line in first.splitlines())
        assert len(pushed) == 7  # with the collection
        load = LOAD.format(root=str(root), original=str(model_folder), stem=STEM)
        assert "ROUND TRIP" in run_client(load, hub_env(hub, None, tmp_path / "home2"), timeout=300)
        calls = len([c for c in hub.calls if "/commit/" in c[1]])
        again = run_client(push, hub_env(hub, "hf_loopback", tmp_path / "home1"), timeout=300)
        assert dict(line.split()[1:] for line in again.splitlines()) == pushed
        assert len([c for c in hub.calls if "/commit/" in c[1]]) == calls  # nothing changed, no commit
        family = json.loads((root / "push" / "tester" / f"{STEM}-compare" / "family.json").read_text())
        place = family["adapters"]["sft-gsm-symbolic"]
        assert place["revision"] == pushed[place["repo"]] and place["subfolder"] == "adapter"
        refused = push.replace("    print", "    pass; print")
        with pytest.raises(AssertionError, match="publish needs a token"):
            run_client(refused, hub_env(hub, None, tmp_path / "home3"), timeout=300)
