"""A sweep: what is asked for, what points share, a kill between and going on, and the curves."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hfsd import curves, pipeline, recipes, rundir, sweep, work
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.findings import Estimate, Results, VariantSummary
from hfsd.plain import dumps, load
from hfsd.records import ModelRef, PrunePlan, TrainSet, Variant
from tests import tiny

PNG = b"\x89PNG\r\n\x1a\n"
OVER = ["prune.blocks=1,2", "data.rows=6,12"]  # the recipe's own are 2 and 12


class Counted:
    """Stages that only write small files, and count how often each is run."""

    def __init__(self) -> None:
        self.ran: Counter[str] = Counter()
        self.fails: str | None = None  # the folder's name and the step at which a run is killed

    def stage(self, write: Callable[[Any, Path], None]) -> Callable[[Any, Any], dict[str, Any]]:
        def do(work: Any, stage: Any) -> dict[str, Any]:
            at = f"{work.root.name} {stage.name}"
            self.ran[at] += 1
            if at == self.fails:
                raise RuntimeError("the machine\nis on fire")
            write(work, stage.path)
            return {}

        return do


def _weights(work: Any, folder: Path) -> None:
    rundir.write_atomic(folder / "model.safetensors", f"weights {time.time_ns()}")
    rundir.write_atomic(folder / "told.json", "{}\n")


def _rewritten(work: Any, folder: Path) -> None:
    rows = work.recipe.data[0].rows
    rundir.write_atomic(
        folder / "stats.json", dumps(TrainSet("rewrite", min(rows, 100), 1.0, {}, 1, 1.0, "x", {}, 1, 1))
    )


def _reported(work: Any, folder: Path) -> None:
    n = work.recipe.prune.blocks
    sets = {work.recipe.data[0].label: load(TrainSet, work.root / "rewrite" / "stats.json")}
    lines = []
    for at, variant in enumerate(work.variants):
        recovery = None if at == 0 else Estimate(100 - 10 * n + at, 90 - 10 * n, 104 - 10 * n)
        lines.append(VariantSummary(variant, 1, Estimate(0.5, 0.4, 0.6), recovery, None, None, None, None))
    plan = PrunePlan(6, tuple(range(6 - n)), "made up")
    results = Results("tiny", ModelRef("m"), 1, plan, None, lines, [], sets, [], {}, 0.1, 0.1, "")
    rundir.write_atomic(folder / "results.json", dumps(results))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counted:
    """Every stage stands in; the working directory is a new one."""
    found = Counted()
    made = {"rewrite": _rewritten, "report": _reported}
    for name in ("scan", "prune", "rewrite", "train", "evaluate", "compare", "report"):
        monkeypatch.setattr(work, name, found.stage(made.get(name, _weights)))
    for name in ("git_state", "package_versions"):  # which cost more than such a stage
        monkeypatch.setattr(rundir, name, lambda: None)
    monkeypatch.chdir(tmp_path)
    return found


@pytest.fixture
def recipe(model_folder: Path, tmp_path: Path) -> str:
    """A recipe file of the tiny model."""
    data = str(tiny.data_file(tmp_path / "problems.jsonl"))
    plain = recipes.dump(tiny.recipe(model_folder, data__source=data))
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(plain))
    return str(path)


def _marks(root: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in root.rglob("DONE.json")}


def test_points_make_only_what_their_value_changes(counted: Counted, recipe: str) -> None:
    found = sweep.run(recipe, OVER)
    root = Path("runs/tiny-sweep")
    assert found.folder == str(root)
    points = [(c.field, p.value, p.folder) for c in found.curves for p in c.points]
    assert points == [
        ("prune.blocks", "1", "prune.blocks=1"),
        ("prune.blocks", "2", "prune.blocks=2"),
        ("data.rows", "6", "data.rows=6"),
        ("data.rows", "12", "prune.blocks=2"),  # the same recipe: run once
    ]
    assert set(counted.ran.values()) == {1}
    ran: dict[str, list[str]] = {}
    for at in counted.ran:
        point, name = at.split()
        ran.setdefault(point, []).append(name)
    arms = ["sft-problems", "self-distilled-problems"]
    learnt = [f"train/{a}" for a in arms] + [f"evaluate/{a}" for a in arms] + ["compare", "report"]
    assert sorted(ran["prune.blocks=1"]) == sorted(
        ["scan", "prune", "rewrite", "evaluate/original", "evaluate/pruned", *learnt]
    )
    assert sorted(ran["prune.blocks=2"]) == sorted(["scan", "prune", "evaluate/pruned", *learnt])
    assert sorted(ran["data.rows=6"]) == sorted(["rewrite", *learnt])
    # every point is a whole run of its own, weights shared on disk and nothing else
    for point in ran:
        assert (root / point / "recipe.yaml").is_file() and not (root / point / "publish").exists()
        pipeline.run(str(root / point / "recipe.yaml"), out=root / point, until="report", verify=True)
    assert set(counted.ran.values()) == {1}
    one, other = (root / p / "prune" for p in ("prune.blocks=2", "data.rows=6"))
    assert (one / "model.safetensors").samefile(other / "model.safetensors")
    assert (one / "told.json").read_bytes() == (other / "told.json").read_bytes()
    assert not (one / "told.json").samefile(other / "told.json")


def test_a_finished_sweep_is_quick_and_tells_the_same(counted: Counted, recipe: str) -> None:
    first = sweep.run(recipe, OVER)
    root = Path(first.folder)
    marks, ran = _marks(root), counted.ran.copy()
    start = time.perf_counter()
    assert sweep.run(recipe, OVER) == first == load(sweep.SweepResult, root / "sweep.json")
    assert time.perf_counter() - start < 4 and counted.ran == ran and _marks(root) == marks
    for curve in first.curves:
        assert (root / curve.picture).read_bytes().startswith(PNG)
        assert f"]({curve.picture})" in (root / "sweep.md").read_text()


def test_more_values_take_what_is_there(counted: Counted, recipe: str) -> None:
    sweep.run(recipe, ["data.rows=50,100"])
    counted.ran.clear()
    (curve,) = sweep.run(recipe, ["data.rows=50,100,200"]).curves
    assert {at.split()[0] for at in counted.ran} == {"data.rows=200"}
    assert "data.rows=200 rewrite" in counted.ran and "data.rows=200 scan" not in counted.ran
    assert [(p.rows, p.note) for p in curve.points] == [(50, ""), (100, ""), (100, "only 100 there")]


def test_an_ordinary_run_is_taken_over_and_left_alone(counted: Counted, recipe: str) -> None:
    ordinary = pipeline.run(recipe, until="report")
    marks = _marks(ordinary)
    counted.ran.clear()
    found = sweep.run(recipe, ["prune.blocks=2,3"], out=Path("elsewhere"))
    assert found.folder == "elsewhere" and {at.split()[0] for at in counted.ran} == {"prune.blocks=3"}
    taken = Path("elsewhere/prune.blocks=2")
    assert recipes.load(str(taken / "recipe.yaml"))[0] == recipes.load(recipe)[0]
    names = {m.parent.relative_to(taken).as_posix() for m in taken.rglob("DONE.json")}
    assert names == {m.parent.relative_to(ordinary).as_posix() for m in marks}
    assert set(json.loads((taken / "manifest.json").read_text())["stages"]) == names
    shutil.rmtree(taken)
    assert _marks(ordinary) == marks
    pipeline.run(recipe, until="report", verify=True)


def test_a_killed_sweep_goes_on(counted: Counted, recipe: str) -> None:
    counted.fails = "prune.blocks=2 train/self-distilled-problems"
    with pytest.raises(HfsdError) as caught:
        sweep.run(recipe, OVER)
    assert str(caught.value) == "prune.blocks=2: RuntimeError: the machine is on fire; --debug shows where"
    root = Path("runs/tiny-sweep")
    assert (root / "prune.blocks=1/report/DONE.json").is_file() and not (root / "sweep.json").exists()
    counted.fails = None
    finished = _marks(root)
    sweep.run(recipe, OVER)
    assert [at for at, n in counted.ran.items() if n > 1] == ["prune.blocks=2 train/self-distilled-problems"]
    assert finished.items() <= _marks(root).items()


def test_a_kill_while_a_stage_is_taken_leaves_none_of_it(
    counted: Counted, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep.run(recipe, ["prune.blocks=1,2"])
    copied: list[Any] = []
    copy = shutil.copy2

    def dies(source: Any, target: Any) -> Any:
        copied.append(target)
        if len(copied) == 2:
            raise KeyboardInterrupt
        return copy(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sweep.shutil, "copy2", dies)
        sweep.run(recipe, ["prune.blocks=1,2,3"])
    begun = Path("runs/tiny-sweep/prune.blocks=3")
    assert not (begun / "rewrite").exists() and not list(begun.rglob("*.tmp"))
    counted.ran.clear()
    sweep.run(recipe, ["prune.blocks=1,2,3"])
    assert "prune.blocks=3 rewrite" not in counted.ran and set(counted.ran.values()) == {1}


def test_a_point_made_again_leaves_the_others(counted: Counted, recipe: str) -> None:
    found = sweep.run(recipe, OVER)
    root = Path(found.folder)
    before = {p: p.read_bytes() for p in (root / "prune.blocks=2").rglob("*") if p.is_file()}
    again = root / "data.rows=6"
    old = (again / "prune/model.safetensors").read_bytes()
    pipeline.run(str(again / "recipe.yaml"), out=again, until="report", redo="scan")
    assert (again / "prune/model.safetensors").read_bytes() != old
    assert {p: p.read_bytes() for p in before} == before
    marks = _marks(root)
    assert sweep.run(recipe, OVER) == found and _marks(root) == marks


def test_a_stage_that_changed_behind_its_marker_is_not_taken(counted: Counted, recipe: str) -> None:
    ordinary = pipeline.run(recipe, until="report")
    (ordinary / "rewrite" / "stats.json").write_text("{}")
    told = r"^prune.blocks=1: .*stats.json has changed since rewrite was finished; make it again: (?P<command>hfsd .*)$"
    with pytest.raises(HfsdError, match=told) as caught:
        sweep.run(recipe, ["prune.blocks=1,3"])
    _follow(re.search(told, str(caught.value))["command"])  # type: ignore[index]
    sweep.run(recipe, ["prune.blocks=1,3"])


def _follow(command: str) -> None:
    """Runs an `hfsd run` that an error names, as far as a report."""
    program, name, path, *options = shlex.split(command)
    given = list(zip(options[::2], options[1::2], strict=True))
    others = dict(given)
    assert (program, name) == ("hfsd", "run") and set(others) <= {"--set", "--out", "--until", "--redo"}
    sets = [value for option, value in given if option == "--set"]
    pipeline.run(path, sets, Path(others["--out"]), others.get("--until", "report"), others["--redo"])


def test_another_recipe_in_the_folder_is_refused_by_point(counted: Counted, recipe: str) -> None:
    sweep.run(recipe, ["prune.blocks=1,2"])
    sets = ["rewrite.temperature=0.5"]
    told = r"^prune.blocks=(?P<n>\d): .*temperature was 0.0 and is now 0.5\. Add --redo"
    for n in "12":
        with pytest.raises(Refusal, match=told) as caught:
            sweep.run(recipe, ["prune.blocks=1,2"], sets)
        assert re.search(told, str(caught.value))["n"] == n  # type: ignore[index]
        line, _, command = str(caught.value).partition("; a sweep has no --redo, the point's own run has: ")
        assert "\n" not in line and command.startswith(f"hfsd run {recipe} --set rewrite.temperature=0.5 --set prune.")
        _follow(command.replace("STAGE", "rewrite"))
    sweep.run(recipe, ["prune.blocks=1,2"], sets)


@pytest.mark.parametrize(
    ("over", "faults"),
    [
        (["prune.blokcs=2,3"], [r"--over prune.blokcs: .*did you mean 'blocks'.*known are: blocks"]),
        (["prone.blocks=2,3"], [r"did you mean 'prune'"]),
        (["prune.blocks=2"], [r"two values or more; for a single one use --set prune.blocks=2"]),
        (["prune.blocks="], [r"two values or more"]),
        (["prune.blocks=2,3,2"], [r"--over prune.blocks=2,3,2: 2 is there twice"]),
        (["train.sft={a: 1},{ a: 1}"], [r"are the same value"]),
        (["prune.blocks=2,-1,x"], [r"greater than or equal to 0; got -1", r"valid integer.*got 'x'"]),
        (["prune.blocks=1,2", "prune.blocks=3,4"], [r"prune.blocks is swept twice"]),
        (["prune.blocks"], [r"write it as a.b=v1,v2"]),
        (["prune.blocks=1,,2"], [r"'1,,2' is no list"]),
        (["prune.blocks=1,2] # 3"], [r"is no list"]),
        (["publish.prefix=a,b"], [r"changes no score"]),
        ([], [r"a sweep needs --over"]),
        (["prune.blocks=2", "data.row=1,2", "data.rows=0,1"], ["two values", "mean 'rows'", "greater.*got 0"]),
    ],
)
def test_every_fault_of_over_is_told_at_once(counted: Counted, recipe: str, over: list[str], faults: list[str]) -> None:
    with pytest.raises(BadRequest) as caught:
        sweep.run(recipe, over)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(faults)
    assert all(re.search(fault, line) for fault, line in zip(faults, lines, strict=True)), lines
    assert not Path("runs").exists()


def test_points_are_looked_at_before_the_first_runs(counted: Counted, recipe: str) -> None:
    with pytest.raises(BadRequest) as caught:
        sweep.run(recipe, ["prune.blocks=1,7,8"], ["scan.calibration=nowhere.txt"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and lines[0].startswith("scan.calibration")  # a fault of all points is told once
    assert lines[1].startswith("prune.blocks=7: prune.blocks: 7 of the 6 blocks")
    assert lines[2].startswith("prune.blocks=8: prune.blocks: 8 of the 6 blocks")
    assert not Path("runs").exists() and not counted.ran


def test_a_field_of_the_data_is_that_of_each_set(model_folder: Path, tmp_path: Path) -> None:
    sets = [{"source": str(tiny.data_file(tmp_path / f"{name}.jsonl")), "name": name} for name in "ab"]
    base = tiny.recipe(model_folder, data=sets)
    (points,) = sweep.planned(base, ["data.rows=6,12"], tmp_path).values()
    assert [[d.rows for d in p.recipe.data] for p in points] == [[6, 6], [12, 12]]
    (points,) = sweep.planned(base, ["data.1.rows=6,12"], tmp_path).values()
    assert [[d.rows for d in p.recipe.data] for p in points] == [[1000, 6], [1000, 12]]


texts = st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1)
scalars = st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False, allow_infinity=False), texts)


@given(st.lists(st.one_of(scalars, st.lists(scalars)), min_size=2, unique_by=lambda v: json.dumps(v)))
def test_values_come_apart_as_they_were_put_together(values: list[Any]) -> None:
    spelled = [json.dumps(v, ensure_ascii=False) for v in values]
    field, found = sweep.parse(f"a.b={','.join(spelled)}")
    assert field == "a.b" and found == spelled


@given(st.text())
def test_whatever_is_asked_is_a_curve_or_a_fault_in_one_line(item: str) -> None:
    try:
        field, values = sweep.parse(item)
    except BadRequest as error:
        assert str(error).startswith("--over ")
    else:
        assert item.startswith(f"{field}=") and len(set(values)) == len(values) >= 2
        assert all(value in item for value in values)


def _curve(values: list[str], **kw: Any) -> curves.Curve:
    known = Estimate(80.0, 70.0, 90.0)
    marks = [
        curves.Mark(Variant("original"), Estimate(0.6, 0.5, 0.7), Estimate(100.0)),
        curves.Mark(Variant("sft", "b"), Estimate(0.48), known),
        curves.Mark(Variant("pruned"), None, None),
        curves.Mark(Variant("sft", "a"), Estimate(0.48, 0.4, 0.5), known),
    ]
    points = [curves.Point(v, f"x={v}", 5, 2, 6, "mean of 2 tasks, n = 9 each", marks, **kw) for v in values]
    return curves.Curve("data.rows", points, "data.rows.png")


def test_a_picture_has_the_values_its_units_and_the_variants_in_order() -> None:
    (axes,) = curves.picture(_curve(["1024", "64", "256"], note="only 5 there"), "tiny").axes
    assert axes.get_xscale() == "log" and set(axes.get_xticks()) == {64, 256, 1024}
    assert axes.get_xticklabels()[0].get_text() == "1024\n(only 5 there)"
    assert "%" in axes.get_ylabel() and axes.get_xlabel() == "training rows asked for (data.rows)"
    assert "n = 9" in axes.get_title() and "95%" in axes.get_title()
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["original (100% by definition)", "sft-a", "sft-b"]
    (axes,) = curves.picture(_curve(["64", "128"]), "tiny").axes
    assert axes.get_xscale() == "linear"
    (axes,) = curves.picture(_curve(["self", "best"]), "tiny").axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["self", "best"]


def test_tables_say_what_is_known_and_what_is_not() -> None:
    curve = _curve(["64", "128"], setups=["tiny_match: acc, n = 9, 5 shots.", "All tasks: limit 9 documents, seed 0."])
    result = sweep.SweepResult("tiny", "org/tiny", "runs/x", [curve])
    head, first, _ = curves.wide(curve)
    assert head[3:] == [
        "original mean %",
        *(f"{v} {what} %" for v in ("pruned", "sft-a", "sft-b") for what in ("mean", "recovery")),
    ]
    assert first[:6] == ["64", "2 of 6", "5", "60.0 [50.0, 70.0]", "n/a", "n/a"]
    assert first[6:] == ["48.0 [40.0, 50.0]", "80.0 [70.0, 90.0]", "48.0 [no interval]", "80.0 [70.0, 90.0]"]
    said = sweep.text(result)
    for written in (said, curves.markdown(result).replace("\\", "")):
        assert written.count("- tiny_match: acc, n = 9, 5 shots.\n") == 1
        assert written.count("- All tasks: limit 9 documents, seed 0.\n") == 1
    assert "64         original  60.0 [50.0, 70.0]" in said and "runs/x/data.rows.png" in said
    assert "n = 9" in said and "runs/x/sweep.md" in said


def test_what_is_asked_otherwise_at_some_points_is_said_with_their_values() -> None:
    few, many = _curve(["4", "8"], setups=["n = 4.", "seed 0."]), _curve(["16"], setups=["n = 16.", "seed 0."])
    curve = curves.Curve("evaluate.limit", [*few.points, *many.points], "x.png")
    assert curve.setups == ["4, 8: n = 4.", "seed 0.", "16: n = 16."]


def test_a_whole_sweep_shares_a_finished_run(
    tiny_run: Path, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_run, "runs/tiny", copy_function=shutil.copy2)
    path = Path("tiny.yaml")
    path.write_text(yaml.safe_dump(recipes.dump(tiny.recipe(model_folder))))
    over = ["evaluate.limit=4,3"]  # what is compared stays, the scores and the report are made again
    found = sweep.run(str(path), over)
    (curve,) = found.curves
    root = Path(found.folder)
    taken, made = (root / p.folder for p in curve.points)
    assert pipeline.results(taken) == pipeline.results(tiny_run)
    theirs, ours = pipeline.results(tiny_run), pipeline.results(made)
    assert {t.n for t in ours.tasks} == {3} and {t.n for t in theirs.tasks} == {4}
    assert (ours.plan, ours.train_sets, ours.training) == (theirs.plan, theirs.train_sets, theirs.training)
    for adapter in tiny_run.glob("train/*/adapter/adapter_model.safetensors"):
        assert (made / adapter.relative_to(tiny_run)).read_bytes() == adapter.read_bytes()
    assert [(p.removed, p.n_layers, p.rows) for p in curve.points] == [(2, 6, 12)] * 2
    assert (root / curve.picture).read_bytes().startswith(PNG)
    setups = "\n".join(curve.setups)
    assert all(f"{n}: {t.task}" in setups for t in theirs.tasks for n in "34")
    assert "4: All tasks: " in setups and "3: All tasks: " in setups and "limit 3 documents" in setups
    start = time.perf_counter()
    assert sweep.run(str(path), over) == found
    assert time.perf_counter() - start < 4
