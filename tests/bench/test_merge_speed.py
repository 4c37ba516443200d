"""Merging two demo models beside the `mergekit-yaml` command: seconds, peak memory, and the bytes of every tensor."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml

from hfsd import shards
from tests.bench.conftest import Table, peak

pytestmark = pytest.mark.bench
NOISE = {"first": 0.05, "second": 0.02}  # of a tensor's standard deviation
OURS = """
import sys
from pathlib import Path
def prepare():
    import torch, transformers
    from transformers import LlamaForCausalLM
    import mergekit.merge_methods
    import hfsd.merge
def work():
    from hfsd import merge
    first, second, out = map(Path, sys.argv[1:])
    merge.run({"first": first, "second": second}, out)
"""
THEIRS = """
import sys
def prepare():
    import mergekit.merge, mergekit.config, transformers
    from transformers import LlamaForCausalLM
def work():
    from mergekit.scripts.run_yaml import main
    main([*sys.argv[1:], "--quiet", "--no-write-model-card"], standalone_mode=False)
"""


@pytest.fixture(scope="module")
def arms(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The demo model twice with its own small noise on every matrix, as two arms of one cut differ."""
    import torch
    from safetensors.torch import load_file, save_file

    made = []
    for seed, (name, share) in enumerate(NOISE.items()):
        folder = tmp_path_factory.mktemp("arms") / name
        shutil.copytree(demo_folder, folder)
        generator = torch.Generator().manual_seed(seed)
        tensors = load_file(folder / shards.WEIGHTS)
        for tensor in tensors.values():
            if tensor.dim() > 1:
                tensor += share * tensor.std() * torch.randn(tensor.shape, generator=generator)
        save_file(tensors, folder / shards.WEIGHTS, metadata={"format": "pt"})
        made.append(folder)
    return made


def _fresh(folder: Path) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    return str(folder)


def _bytes(folder: Path) -> dict[str, bytes]:
    found = {}
    for tensor in shards.read(folder):
        with open(tensor.file, "rb") as handle:
            handle.seek(tensor.start)
            found[tensor.name] = handle.read(tensor.bytes)
    return found


@pytest.mark.timeout(1800)
def test_merging_beside_mergekit_yaml(arms: list[Path], tmp_path: Path, table: Table) -> None:
    first, second = map(str, arms)
    config = tmp_path / "merge.yaml"
    asked = {"merge_method": "slerp", "base_model": first, "models": [{"model": m} for m in (first, second)]}
    config.write_text(yaml.safe_dump(asked | {"parameters": {"t": 0.5}}))
    least: dict[str, dict[str, float]] = {}
    for _ in range(5):
        for name, code, arguments in (
            ("hfsd", OURS, (first, second, _fresh(tmp_path / "ours"))),
            ("mergekit-yaml", THEIRS, (str(config), _fresh(tmp_path / "theirs"))),
        ):
            found = peak(code, *arguments)
            least[name] = {k: min(v, least.get(name, found)[k]) for k, v in found.items()}
    rows: list[tuple[object, ...]] = [("what", "seconds", "MB")]
    for name, found in least.items():
        rows.append((f"{name}, imports done", f"{found['seconds']:.2f}", f"{found['above']:.0f} above"))
        rows.append((f"{name}, whole process", f"{found['process']:.2f}", f"{found['whole']:.0f}"))
    ours, theirs = least["hfsd"], least["mergekit-yaml"]
    rows.append(("ours / theirs, imports done", f"{ours['seconds'] / theirs['seconds']:.2f} x", ""))
    rows.append(("theirs / ours, memory above the imports", "", f"{theirs['above'] / ours['above']:.1f} x"))
    table("SLERP of two SmolLM2-135M in float32 (0.54 GB each), least of 5", rows)
    assert _bytes(tmp_path / "ours") == _bytes(tmp_path / "theirs")
    assert ours["above"] <= theirs["above"] / 2
