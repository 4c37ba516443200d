"""Two processes of a launcher train what one does, write once, and say what really ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from hfsd import pipeline, recipes
from hfsd.recipe import Recipe
from tests import tiny

ARMS = ("sft-gsm-symbolic", "self-distilled-gsm-symbolic", "sdd+kd-gsm-symbolic")


def _asked(model_folder: Path, per_device: int) -> Recipe:
    """Eleven rows, which fill no whole number of steps."""
    sft = {"per_device_train_batch_size": per_device, "save_steps": 1}
    return tiny.recipe(model_folder, data__rows=11, train__sft=sft, train__arms=["sft", "self-distilled", "sdd+kd"])


@pytest.fixture(scope="module")
def on_one(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipeline.run(_asked(model_folder, 4), out=tmp_path_factory.mktemp("one") / "tiny", until="train")


@pytest.fixture(scope="module")
def on_two(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The same, half the rows of a step per process, FSDP asked for; and what was said."""
    root = tmp_path_factory.mktemp("two") / "tiny"
    file = root.parent / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipes.dump(_asked(model_folder, 2))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "hfsd", "train", str(file), "--out", str(root)]
    home = Path(__file__).parents[1]
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    env = os.environ | {"PYTHONPATH": str(home)} | fsdp
    done = subprocess.run(command, env=env, cwd=home, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return root, done.stdout + done.stderr


def test_two_processes_train_what_one_does(on_one: Path, on_two: tuple[Path, str]) -> None:
    from safetensors.torch import load_file

    root, _ = on_two
    for arm in ARMS:
        one, two = (json.loads((r / "train" / arm / "train.json").read_text()) for r in (on_one, root))
        assert (one["steps"], one["tokens"]) == (two["steps"], two["tokens"]) and one["steps"] == 3
        assert two["fairness"]["row_ids_in_order"] == one["fairness"]["row_ids_in_order"]
        # GKDTrainer takes each process's own mean over tokens, the others that of all processes
        near = {"rel": 0.05} if "kd" in arm else {"abs": 1e-4}
        assert [v for _, v in two["losses"]] == pytest.approx([v for _, v in one["losses"]], **near)
        mine, theirs = (load_file(r / "train" / arm / "merged" / "model.safetensors") for r in (root, on_one))
        assert mine.keys() == theirs.keys()
        assert max((mine[k] - theirs[k]).abs().max().item() for k in mine) < (1e-3 if "kd" in arm else 1e-5)


def test_only_the_first_process_writes_and_what_really_ran_is_said(on_two: tuple[Path, str]) -> None:
    root, said = on_two
    log = (root / "run.log").read_text().splitlines()
    begun = [line.split()[1] for line in log if " begins," in line]
    assert (
        begun
        == ["scan", "prune", "rewrite", *(f"train/{arm}" for arm in ARMS)]
        == [line.split()[1] for line in log if " ends " in line]
    )
    ran = "DDP over 2 processes (gloo); FSDP was asked for, and accelerate does not run it here"
    assert said.count(f"train: {ran}") == 3 and said.count("train is done in") == 1
    for arm in ARMS:
        assert json.loads((root / "train" / arm / "DONE.json").read_text())["engine"] == ran
        assert not (root / "train" / arm / "work").exists()


@pytest.mark.parametrize("name", recipes.launchers())
def test_packaged_launchers_are_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    file = recipes.PACKAGED / "accelerate" / f"{name}.yaml"
    config = ClusterConfig.from_yaml_file(yaml_file=str(file))
    machines = {"gpu1": (1, 1, "NO"), "gpu8": (1, 8, "MULTI_GPU")}
    machines |= {"gpu8-fsdp": (1, 8, "FSDP"), "gpu2x8": (2, 16, "FSDP")}
    assert (config.num_machines, config.num_processes, str(config.distributed_type.value)) == machines[name]
    assert config.mixed_precision == "bf16"
    if machines[name][2] == "FSDP":
        assert (config.fsdp_config["fsdp_version"], config.fsdp_config["fsdp_state_dict_type"]) == (
            2,
            "FULL_STATE_DICT",
        )


def test_the_launchers_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    from typer.testing import CliRunner

    from hfsd.cli import app

    listed = CliRunner().invoke(app, ["recipe"]).output
    assert "gpu2x8 (for accelerate launch)" in listed
    assert CliRunner().invoke(app, ["recipe", "gpu8"]).output == recipes.launcher_text("gpu8")
