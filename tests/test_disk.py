"""What a run writes to disk, and the refusal of a run that the disk has no room for."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from hfsd import disk, pipeline
from hfsd.errors import HfsdError
from tests import tiny

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.bare_llama8b(tmp_path_factory.mktemp("bare"))


def _full(folder: Path, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 10**12 - free, free))


def test_disk_of_a_plan_is_what_a_run_leaves(tiny_run: Path, model_folder: Path) -> None:
    recipe = tiny.recipe(model_folder)
    sizes = disk.sizes(recipe)
    assert sizes is not None and not sizes.absent and not disk.fetching(sizes)
    adapter = next(tiny_run.glob("train/*/adapter/adapter_model.safetensors")).stat().st_size
    names = ["prune", *(f"train/{p.name}" for p in sorted((tiny_run / "train").iterdir()))]
    for need in disk.needs(recipe, sizes, names, tiny_run, adapter):
        written = sum(p.stat().st_size for p in (tiny_run / need.step).rglob("*.safetensors"))
        assert need.stays == pytest.approx(written, rel=0.05)  # headers apart, which are much of so small a file


def test_full_training_s_checkpoints_are_counted(model_folder: Path) -> None:
    recipe = tiny.recipe(model_folder, train__method="full", train__lora={})
    sizes = disk.sizes(recipe)
    assert sizes is not None
    cut = sizes.kept(recipe, least=False)
    need = disk.needs(recipe, sizes, ["train/sft-gsm-symbolic"], Path("runs"), None)[0]
    assert need.passes == 3 * 3 * 4 * cut.params + 4 * cut.params  # 3 at a time, and the last weights


def test_a_run_that_the_disk_has_no_room_for_is_refused(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(model_folder)
    sizes = disk.sizes(recipe)
    assert sizes is not None
    needed = 3 * sizes.kept(recipe, least=True).bytes  # the cut, and two arms merged
    _full(tmp_path, needed - 1, monkeypatch)
    with pytest.raises(
        HfsdError, match=r"free, and this run needs at least .* there \(prune .*, train/sft.*--out.*arms"
    ):
        pipeline.run(recipe, out=tmp_path / "run")
    assert not list(tmp_path.rglob("START.json"))


def test_what_is_done_is_not_needed_again(
    tiny_run: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(model_folder)
    _full(tmp_path, 0, monkeypatch)
    disk.check(recipe, tiny_run, [])
    disk.check(recipe, tiny_run, [("report", tiny_run / "report")])
    shutil.copytree(tiny_run / "prune", tmp_path / "run" / "prune")  # a killed step that left its files
    disk.check(recipe, tmp_path / "run", [("prune", tmp_path / "run" / "prune")])
    with pytest.raises(HfsdError, match="has 0 B free"):
        disk.check(recipe, tmp_path, [("prune", tmp_path / "prune")])


def test_a_begun_full_training_needs_what_its_folder_does_not_hold(
    model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny.recipe(model_folder, train__method="full", train__lora={})
    name, folder = "train/sft-gsm-symbolic", tmp_path / "train" / "sft-gsm-symbolic"
    need = disk.needs(recipe, disk.sizes(recipe), [name], tmp_path, None, least=True)[0]
    assert need.stays and need.passes and need.passes > 2 * need.stays
    held = folder / "work" / "checkpoint-3" / "optimizer.pt"
    held.parent.mkdir(parents=True)
    held.write_bytes(b"")
    with open(held, "wb") as file:
        file.truncate(need.passes)
    _full(tmp_path, need.stays, monkeypatch)
    disk.check(recipe, tmp_path, [(name, folder)])
    _full(tmp_path, need.stays - 1, monkeypatch)
    with pytest.raises(HfsdError, match="needs at least"):
        disk.check(recipe, tmp_path, [(name, folder)])
    (tmp_path / "other").hardlink_to(held)  # its bytes stay when the training ends
    _full(tmp_path, need.stays + need.passes - 1, monkeypatch)
    with pytest.raises(HfsdError, match="needs at least"):
        disk.check(recipe, tmp_path, [(name, folder)])


def test_the_fetch_of_the_original_is_part_of_the_need(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, todo = tiny.recipe(bare, prune__blocks=6), [("prune", tmp_path / "prune")]
    whole, cut = 2 * 8_030_261_248, 2 * 6_721_589_248
    _full(tmp_path, whole + cut, monkeypatch)
    disk.check(recipe, tmp_path, todo)
    _full(tmp_path, whole + cut - 1, monkeypatch)
    with pytest.raises(HfsdError, match=r"there \(\(fetch\) 16.06 GB, prune 13.44 GB\).*HF_HOME"):
        disk.check(recipe, tmp_path, todo)
    monkeypatch.setattr(disk, "same_disk", lambda *_: False)  # a cache on a disk of its own
    disk.check(recipe, tmp_path, todo)
    _full(tmp_path, whole - 1, monkeypatch)
    with pytest.raises(HfsdError, match=f"{bare.name} has 16.06 GB free, and this run needs at least 16.06 GB there"):
        disk.check(recipe, tmp_path, todo)


def test_shards_that_are_here_are_not_fetched_again(bare: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((bare / "config.json").read_bytes())
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with open(tmp_path / names[0], "wb") as file:
        file.truncate(10**10)
    sizes = disk.sizes(tiny.recipe(tmp_path, prune__blocks=6))
    assert sizes is not None and sizes.absent == 2 * 8_030_261_248 - 10**10
