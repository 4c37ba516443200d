"""A published family in memory, from folders of this machine: one set of weights, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from hfsd import familyfile, fetch, load_family, loading, publish, recipes, shards
from hfsd.errors import BadRequest, Refusal

STEM = "tiny-llama-pruned2"
SFT, SELF = "sft-gsm-symbolic", "self-distilled-gsm-symbolic"
MERGED = {"pruned": "prune/checkpoint", SFT: f"train/{SFT}/merged", SELF: f"train/{SELF}/merged"}


def logits(model: Any) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.arange(24)[None]).logits  # [1, T, V]


def stock(folder: Path) -> Any:
    """Logits of a checkpoint as transformers loads it."""
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture
def published(tiny_run: Path, tmp_path: Path) -> Path:
    """The folders of the tiny run's repos, to be changed."""
    return Path(shutil.copytree(tiny_run / "publish", tmp_path / "publish"))


def edited(folder: Path, **changes: Any) -> Path:
    """Changes fields of a repo's family.json."""
    path = folder / familyfile.NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def tamper(folder: Path, name: str) -> None:
    """Flips one bit of a tensor."""
    tensor = next(t for t in shards.read(folder) if t.name.startswith(name))
    with open(tensor.file, "r+b") as handle:
        handle.seek(tensor.start)
        byte = handle.read(1)[0]
        handle.seek(tensor.start)
        handle.write(bytes([byte ^ 1]))


def test_a_run_loads_on_one_set_of_weights(tiny_run: Path, model_folder: Path) -> None:
    import torch
    from safetensors.numpy import load_file

    loaded = load_family(tiny_run)
    assert loaded.ids == ["original", "pruned", *sorted([SFT, SELF])] and loaded.left_out == []
    for variant, folder in MERGED.items():
        with loaded.use(variant) as model:
            assert torch.allclose(logits(model), stock(tiny_run / folder), atol=1e-4), variant
    with loaded.use("original") as model:
        assert torch.equal(logits(model), stock(model_folder))
    assert loaded.tokenizer.chat_template
    # Memory is the original plus the adapters.
    own = {p.data_ptr() for p in loaded.family.original.parameters()}
    arms = [(n, p) for n, p in loaded.family.arms.named_parameters()]
    assert all(p.data_ptr() in own for n, p in arms if "lora_" not in n)
    added = sum(p.nbytes for n, p in arms if p.data_ptr() not in own)
    files = [tiny_run / "train" / arm / "adapter" / "adapter_model.safetensors" for arm in (SFT, SELF)]
    assert added == sum(t.nbytes for f in files for t in load_file(f).values())


def test_every_folder_of_a_run_leads_to_the_family(tiny_run: Path) -> None:
    places = [tiny_run, tiny_run / "publish", *(tiny_run / "publish" / n for n in (STEM, f"{STEM}-compare"))]
    for place in places:
        found = loading.find(place)
        assert found.folder(found.file.adapters[SFT]).samefile(tiny_run / "publish" / f"{STEM}-{SFT}" / "adapter")
    for place, said in ((tiny_run / "scan", "no family.json"), ("./nothing", "no such folder")):
        with pytest.raises(BadRequest, match=said):
            loading.find(place)


def test_adapters_in_repos_of_their_own_are_found(tiny_run: Path, tmp_path: Path) -> None:
    recipe = recipes.parse((tiny_run / "recipe.yaml").read_text(), "recipe")
    recipe = recipe.model_copy(update={"publish": recipe.publish.model_copy(update={"adapter": "repo"})})
    publish.to_folder(recipe, tiny_run, fetch.resolve(recipe.model), tmp_path)
    for place in (tmp_path, tmp_path / f"{STEM}-{SFT}-adapter"):
        loaded = load_family(place)
        assert loaded.file.adapters[SFT].path == f"../{STEM}-{SFT}-adapter" and SFT in loaded.ids


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        ("model.layers.{kept}.mlp.up_proj", "block {kept} of .* is not what the pruned model was cut from"),
        ("model.embed_tokens", "model.embed_tokens.weight of .* is not what the pruned model was cut from"),
        ("model.layers.{removed}.mlp.up_proj", None),
    ],
)
def test_a_tampered_block_is_refused_by_name(published: Path, tensor: str, said: str | None) -> None:
    kept = loading.find(published).file.kept
    names = {"kept": kept[-1], "removed": min(set(range(6)) - set(kept))}
    tamper(published / "tiny-llama-original", tensor.format(**names))
    if said is None:  # no arm has that block
        load_family(published)
        return
    with pytest.raises(Refusal, match=said.format(**names)):
        load_family(published)


def test_an_original_of_another_depth_is_refused(published: Path) -> None:
    folder = edited(published / STEM, original={"path": f"../{STEM}"})
    with pytest.raises(Refusal, match="has 4 blocks; the family was cut from a model of 6"):
        load_family(folder)


def test_another_adapter_than_the_named_one_is_refused(published: Path) -> None:
    tamper_at = published / f"{STEM}-{SFT}" / "adapter" / "adapter_model.safetensors"
    tamper_at.write_bytes(tamper_at.read_bytes()[:-1] + b"\x01")
    with pytest.raises(Refusal, match=f"{SFT}: adapter_model.safetensors of .* is not the one"):
        load_family(published)
    assert load_family(published, variants=[SELF]).left_out == [SFT]


def test_a_whole_checkpoint_is_loaded_where_it_is_asked_for(published: Path, tiny_run: Path) -> None:
    import torch

    folder = published / STEM
    adapters = json.loads((folder / familyfile.NAME).read_text())["adapters"]
    whole = {SFT: {"path": f"../{STEM}-{SFT}"}}
    edited(folder, adapters={SELF: adapters[SELF]}, checkpoints=whole)
    loaded = load_family(folder)
    assert loaded.ids == ["original", "pruned", SELF] and loaded.left_out == [SFT]
    with pytest.raises(BadRequest, match=rf"a whole checkpoint of [\d,]+ parameters.*variants=\['{SFT}'\]"):
        loaded.use(SFT)
    with load_family(folder, variants=[SFT]).use(SFT) as model:
        assert torch.equal(logits(model), stock(tiny_run / MERGED[SFT]))
    with pytest.raises(BadRequest, match=f"no variant 'sft-gsm-symbolik'.*did you mean '{SFT}'"):
        load_family(folder, variants=["sft-gsm-symbolik"])


PLACES = [
    ({"path": "../../secret"}, "outside of"),
    ({"path": "/etc"}, "outside of"),
    ({"repo": "../secret"}, "no Hub id"),
    ({}, "no Hub id"),
    ({"repo": "org/name", "revision": "../../x"}, "no commit"),
    ({"repo": "org/name", "subfolder": "../x"}, "none of its repo"),
    ({"repo": "org/name", "subfolder": "/x"}, "none of its repo"),
]


def test_no_place_leads_out_of_its_folder(published: Path) -> None:
    folder = published / STEM
    before = (folder / familyfile.NAME).read_text()
    for field in ("original", "adapters", "checkpoints", "records"):
        for place, said in PLACES:
            edited(folder, **{field: place if field in ("original", "records") else {"x": place}})
            with pytest.raises(BadRequest, match=f"{said}.*refused"):
                load_family(folder)
            (folder / familyfile.NAME).write_text(before)


def test_a_file_from_the_hub_names_no_folder(published: Path) -> None:
    path = published / STEM / familyfile.NAME
    assert familyfile.read(path, local=True).original.path == "../tiny-llama-original"
    with pytest.raises(BadRequest, match="a family on the Hub names repos only; refused"):
        familyfile.read(path, local=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kept": [1, 0]}, "no ascending numbers"),
        ({"kept": [0, 9]}, "no ascending numbers"),
        ({"shared": {}}, "no sha256 of block 0"),
        ({"other": 1}, "unknown keys"),
        ({"adapters": 3}, "no family of models"),
    ],
)
def test_a_damaged_family_file_is_told(published: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        load_family(edited(published / STEM, **changes))


def test_no_code_of_a_repo_is_run_and_no_pickle_read(published: Path) -> None:
    folder, ran = published / "tiny-llama-original", published / "ran"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "made-up", "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    with pytest.raises(Refusal, match="brings Python code of its own"):
        load_family(published)
    assert not ran.exists()
    adapter = published / f"{STEM}-{SELF}" / "adapter" / "adapter_model.safetensors"
    adapter.rename(adapter.with_name("adapter_model.bin"))
    with pytest.raises(BadRequest, match=f"{SELF}: .* holds no adapter_model.safetensors"):
        load_family(published)
