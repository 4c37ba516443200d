"""The whole way on a tiny model: skip, refuse, redo, and what a finished run holds."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from hfsd import pipeline, steps
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.findings import Results
from hfsd.plain import load
from tests import tiny


@pytest.fixture
def copy(tiny_run: Path, tmp_path: Path) -> Path:
    """A copy of the finished run that a test may change, with its mtimes."""
    return Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))


def test_every_step_ends_with_a_marker_of_its_outputs(tiny_run: Path) -> None:
    names = {m.parent.relative_to(tiny_run).as_posix() for m in tiny_run.rglob("DONE.json")}
    arms = {"sft-gsm-symbolic", "self-distilled-gsm-symbolic"}
    expected = {"scan", "prune", "rewrite", "compare", "report", "publish"}
    assert names == expected | {f"train/{a}" for a in arms} | {f"evaluate/{a}" for a in arms | {"original", "pruned"}}
    for marker in tiny_run.rglob("DONE.json"):
        done = json.loads(marker.read_text())
        assert done["outputs"] and done["packages"]["transformers"] and done["model"]["revision"].startswith("sha256:")
        assert all((marker.parent / name).stat().st_size == seen["size"] for name, seen in done["outputs"].items())
    assert not list(tiny_run.rglob("*.tmp")) and not list(tiny_run.rglob("START.json"))
    manifest = json.loads((tiny_run / "manifest.json").read_text())
    assert set(manifest["stages"]) == names


def test_results_hold_every_variant_on_every_task(tiny_run: Path) -> None:
    found = load(Results, tiny_run / "report" / "results.json")
    ids = ["original", "pruned", "sft-gsm-symbolic", "self-distilled-gsm-symbolic"]
    assert [v.variant.id for v in found.variants] == ids
    for task in found.tasks:
        assert set(task.scores) == set(ids) and task.n == 4
    original, *others = found.variants
    assert original.shift is None and all(v.shift and v.shift.sampled.kl > 0 for v in others)
    assert original.params > others[0].params == others[1].params
    assert len(found.plan.removed) == 2 and len(found.training) == 2


def test_arms_differ_in_nothing_but_the_text(tiny_run: Path) -> None:
    first, second = (json.loads(p.read_text()) for p in sorted(tiny_run.glob("train/*/train.json")))
    assert first["fairness"] == second["fairness"] and first["steps"] == second["steps"] == 3


def test_the_reports_times_are_those_of_the_recipes_steps(tiny_run: Path, copy: Path, model_folder: Path) -> None:
    steps = {m.parent.relative_to(tiny_run).as_posix() for m in tiny_run.rglob("DONE.json")} - {"report", "publish"}
    assert set(load(Results, tiny_run / "report" / "results.json").stage_seconds) == steps
    # what an earlier recipe of the same folder left: two data sets, and a merge
    for left in ("rewrite/old", "merge/merged-old", "train/sft-old"):
        shutil.copytree(copy / "evaluate" / "pruned", copy / left)
    shutil.rmtree(copy / "report")
    pipeline.run(tiny.recipe(model_folder), out=copy, until="report")
    assert set(load(Results, copy / "report" / "results.json").stage_seconds) == steps


def test_a_local_embedding_model_counts_by_what_it_holds(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "embedder"
    (folder / "1_Pooling").mkdir(parents=True)
    for name, content in (("modules.json", "[]"), ("1_Pooling/config.json", "{}"), ("README.md", "x")):
        (folder / name).write_text(content)
    asked = tiny.recipe(model_folder, compare__similarity_model=str(folder), rewrite__similarity_model=str(folder))

    def keys() -> dict[str, str]:
        return {s.stage.name: s.stage.key for s in steps.steps(asked, tmp_path / "run")}

    first = keys()
    (folder / "README.md").write_text("y")
    assert keys() == first
    (folder / "1_Pooling/config.json").write_text('{"mode": "mean"}')
    again = keys()
    assert {n for n in first if first[n] == again[n]} == {"scan", "prune", "evaluate/original", "evaluate/pruned"}


def test_a_finished_run_is_skipped_quickly_and_unchanged(tiny_run: Path, model_folder: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file() and p.name != ".lock"}
    start = time.perf_counter()
    pipeline.run(tiny.recipe(model_folder), out=tiny_run)
    assert time.perf_counter() - start < 2
    assert before == {p: p.stat().st_mtime_ns for p in tiny_run.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_changed_field_is_refused_by_name_and_redone_on_request(copy: Path, model_folder: Path) -> None:
    changed = tiny.recipe(model_folder, compare__prompts=1)
    with pytest.raises(Refusal, match=r"compare\.prompts was 2 and is now 1.*--redo compare"):
        pipeline.run(changed, out=copy)
    kept = {p: p.stat().st_mtime_ns for p in copy.glob("train/*/DONE.json")}
    pipeline.run(changed, out=copy, redo="compare")
    assert load(Results, copy / "report" / "results.json").variants[1].shift.sampled.prompts == 1  # type: ignore[union-attr]
    assert kept == {p: p.stat().st_mtime_ns for p in copy.glob("train/*/DONE.json")}


def test_another_cut_keeps_the_rewrites(copy: Path, model_folder: Path) -> None:
    rewritten = (copy / "rewrite" / "DONE.json").stat().st_mtime_ns
    pipeline.run(tiny.recipe(model_folder, prune__blocks=1), out=copy, redo="scan", until="train")
    assert (copy / "rewrite" / "DONE.json").stat().st_mtime_ns == rewritten
    assert (copy / "evaluate" / "original" / "DONE.json").is_file()  # the original does not depend on the cut
    assert not (copy / "evaluate" / "pruned").exists()


def test_verify_finds_an_output_that_changed_behind_its_marker(copy: Path, model_folder: Path) -> None:
    weights = copy / "prune" / "checkpoint" / "model.safetensors"
    stat = weights.stat()
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    pipeline.run(tiny.recipe(model_folder), out=copy)  # size and time are as recorded
    with pytest.raises(HfsdError, match="has changed since prune was finished"):
        pipeline.run(tiny.recipe(model_folder), out=copy, verify=True)


def test_a_missing_output_is_named(copy: Path, model_folder: Path) -> None:
    (copy / "rewrite" / "reference.parquet").unlink()
    with pytest.raises(HfsdError, match=r"reference\.parquet is gone since rewrite .*--out \S+ --redo rewrite"):
        pipeline.run(tiny.recipe(model_folder), out=copy)


def test_a_wrong_recipe_lists_every_fault_before_anything_is_made(model_folder: Path, tmp_path: Path) -> None:
    wrong = tiny.recipe(
        model_folder,
        prune__blocks=9,
        data__source="nowhere.jsonl",
        evaluate__tasks=["demo_rnk"],
        train__sft={"learning_rat": 1},
        train__adapter_from={"sft": "nowhere"},
    )
    with pytest.raises(BadRequest) as caught:
        pipeline.run(wrong, out=tmp_path / "run")
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    faults = ("data.source: no file", "adapter_from.sft: no folder", "mean 'learning_rate'", "demo_rank", "9 of the 6")
    for expected in faults:
        assert any(expected in line for line in lines), (expected, lines)
    assert not (tmp_path / "run").exists()


def test_faults_of_shape_and_of_fact_are_told_together(model_folder: Path, tmp_path: Path) -> None:
    import yaml

    from hfsd import recipes

    data = recipes.dump(tiny.recipe(model_folder, prune__blocks=9, data__source="nowhere.jsonl"))
    data["train"]["sead"] = 3
    data["evaluate"]["limit"] = "many"
    path = tmp_path / "wrong.yaml"
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(BadRequest) as caught:
        pipeline.run(path, out=tmp_path / "run")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for expected in (
        "mean 'seeds'",
        "limit: input should be a valid integer",
        "no file nowhere.jsonl",
        "9 of the 6 blocks",
    ):
        assert any(expected in line for line in lines), (expected, lines)


def test_unknown_stage_names_are_refused(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="did you mean 'prune'"):
        pipeline.run(tiny.recipe(model_folder), out=tmp_path, until="prun")


def test_what_the_user_already_has_is_taken(tiny_run: Path, model_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "mine.jsonl"
    rows.write_bytes((tiny_run / "rewrite" / "rewrites.jsonl").read_bytes())
    adapter = next(tiny_run.glob("train/sft-*/adapter"))
    taken = tiny.recipe(
        model_folder,
        rewrite__from=str(rows),
        train__adapter_from={"sft": str(adapter)},
        prune={"from": str(tiny_run / "prune" / "checkpoint")},
    )
    root = pipeline.run(taken, out=tmp_path / "run", until="train")
    assert not (root / "scan").exists()
    same = "prune/checkpoint/model.safetensors"
    assert (root / same).read_bytes() == (tiny_run / same).read_bytes()
    weights = "adapter/adapter_model.safetensors"
    assert (next(root.glob("train/sft-*")) / weights).read_bytes() == (adapter.parent / weights).read_bytes()
    assert json.loads((root / "rewrite" / "stats.json").read_text())["engine"] == "from mine.jsonl"
