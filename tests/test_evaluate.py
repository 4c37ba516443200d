"""Evaluation: scores against lm-eval's own, resumption, files, processes, refusals."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hfsd import documents, evaluate, harness, pipeline, session, stats, steps, taskdata
from hfsd import work as doing
from hfsd.errors import BadRequest, HfsdError
from hfsd.findings import EvalRow, Setup
from hfsd.recipe import Evaluate
from hfsd.records import Variant
from tests import tiny
from tests.test_harness import arc, written
from tests.test_taskdata import examples

ORIGINAL = Variant("original")
DEMO = ("demo_match", "demo_rank", "demo_bpb")


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs")
    taskdata.write(taskdata.build(examples(), 4, 0), folder)
    return folder


def run(model: Any, docs: Path, out: Path, tasks: tuple[str, ...] = ("demo",), **fields: Any) -> list[EvalRow]:
    """The scores of a model; None: none may be needed."""
    tokenizer = fields.pop("tokenizer", None) or tiny.tokenizer()

    def backend() -> Any:
        assert model is not None, "evaluated again"
        return evaluate.in_process(model, tokenizer, 2048)

    return evaluate.run(backend, tokenizer, ORIGINAL, harness.Tasks(Evaluate(tasks=tasks, **fields), docs), out)


@pytest.fixture(scope="module")
def scored(model: Any, docs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[EvalRow], Path]:
    out = tmp_path_factory.mktemp("out")
    return run(model, docs, out), out


def test_rows_and_files(scored: tuple[list[EvalRow], Path], docs: Path) -> None:
    rows, out = scored
    assert [(r.task, r.metric, r.chance, r.n, r.shots) for r in rows] == [
        ("demo_match", "acc_norm", 0.25, 4, 0),
        ("demo_rank", "acc", 0.25, 4, 0),
        ("demo_bpb", "bits_per_byte", None, 4, 0),
    ]
    assert [r.higher_is_better for r in rows] == [True, True, False]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        f"{t}{end}" for t in DEMO for end in (".json", ".docs.jsonl")
    )
    for row in rows:
        lines = [json.loads(line) for line in (out / row.doc_file).open(encoding="utf-8")]
        sources = [json.loads(line) for line in (docs / f"{row.task}.jsonl").open(encoding="utf-8")]
        assert [line["id"] for line in lines] == [doc["id"] for doc in sources]
        assert [len(line["responses"]) for line in lines] == [len(doc["choices"]) for doc in sources]
        assert len({line["hash"] for line in lines}) == row.n
        if row.metric == "bits_per_byte":
            pairs = [line["metrics"][row.metric] for line in lines]
            assert [b for _, b in pairs] == [len(doc["choices"][0].encode()) for doc in sources]
            bits = -sum(a for a, _ in pairs) / sum(b for _, b in pairs) / math.log(2)
            assert row.value == pytest.approx(bits) and row.stderr is not None and 0 < row.stderr < row.value
        else:
            assert row.value == sum(line["metrics"][row.metric] for line in lines) / row.n
        raw = json.loads((out / f"{row.task}.json").read_text(encoding="utf-8"))["lm_eval"]
        assert raw["n-samples"]["effective"] == row.n and raw["task_hash"]
        assert row.setup == Setup(chat_template=True, multiturn=True) and raw["setup"] == dataclasses.asdict(row.setup)
        assert {"versions", "n-shot", "configs", "lm_eval_version", "data"} <= raw.keys()
        assert str(docs) not in (out / f"{row.task}.json").read_text(encoding="utf-8")  # no path of this machine


def test_the_demo_shares_the_right_solution(scored: tuple[list[EvalRow], Path], docs: Path) -> None:
    """Its log-likelihood is the same in all three tasks: it was computed once."""
    _, out = scored
    seen = []
    for task in DEMO:
        gold = [json.loads(line)["gold"] for line in (docs / f"{task}.jsonl").open(encoding="utf-8")]
        lines = [json.loads(line) for line in (out / f"{task}.docs.jsonl").open(encoding="utf-8")]
        seen.append([line["responses"][g] for line, g in zip(lines, gold, strict=True)])
    assert seen[0] == seen[1] == seen[2]


def test_scores_equal_lm_evals_own_run(scored: tuple[list[EvalRow], Path], model: Any, docs: Path) -> None:
    """The packaged tasks by lm-eval's simple_evaluate and its `hf` backend: what its command line would print."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=harness.PACKAGED, include_defaults=False)
    files = [{"task": t, "dataset_kwargs": {"data_files": {"test": str(docs / f"{t}.jsonl")}}} for t in DEMO]
    result = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=1),
        tasks=[{"group": "all", "task": files}],
        task_manager=manager,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert result is not None
    for row in scored[0]:
        assert row.value == pytest.approx(result["results"][row.task][f"{row.metric},{row.filter}"], abs=1e-5)
        same_documents(scored[1], row, result["samples"][row.task])


def same_documents(out: Path, row: EvalRow, samples: list[Any]) -> None:
    """Each document's own score and log-likelihoods are those that lm-eval logged; so is what was asked."""
    lines = [json.loads(line) for line in (out / row.doc_file).open(encoding="utf-8")]
    for line, sample in zip(lines, sorted(samples, key=lambda s: s["doc_id"]), strict=True):
        assert line["hash"] == sample["doc_hash"]
        assert line["metrics"][row.metric] == pytest.approx(sample[row.metric], abs=1e-4)
        likelihoods = [float(response[0]) for response in sample["filtered_resps"]]
        assert line["responses"] == pytest.approx(likelihoods, abs=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tiny", "demo"])
def test_the_original_scores_as_on_lm_evals_command_line(which: str, model_folder: Path, tmp_path: Path) -> None:
    """To the last document: the packaged tasks by `python -m lm_eval`, where their documents lie."""
    from hfsd import data, fetch, models, recipes

    folder, rows, limit = model_folder, examples(), None
    if which == "demo":
        asked = recipes.load("demo")[0]
        folder = fetch.resolve(asked.model).folder
        rows, limit = data.split(data.load(asked.data[0]), asked.data[0]).held_out, 12
    docs, out, theirs = (tmp_path / n for n in ("docs", "out", "theirs"))
    taskdata.write(taskdata.build(rows, limit, 0), docs)
    tasks = harness.Tasks(Evaluate(), docs)
    loaded = models.load(folder, "float32")
    tokenizer = models.load_tokenizer(folder)
    mine = evaluate.run(lambda: evaluate.in_process(loaded, tokenizer, 2048), tokenizer, ORIGINAL, tasks, out)
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", *DEMO, "--log_samples"]
    command += ["--include_path", str(harness.PACKAGED), "--output_path", str(theirs)]
    command += ["--apply_chat_template", "--fewshot_as_multiturn"]
    done = subprocess.run(command, cwd=docs, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (whole,) = theirs.rglob("results_*.json")
    results = json.loads(whole.read_text())["results"]
    for row in mine:
        assert row.value == pytest.approx(results[row.task][f"{row.metric},{row.filter}"], abs=1e-5)
        (logged,) = theirs.rglob(f"samples_{row.task}_*.jsonl")
        same_documents(out, row, [json.loads(line) for line in logged.read_text().splitlines()])


def test_a_finished_task_is_not_run_again(scored: tuple[list[EvalRow], Path], docs: Path) -> None:
    rows, out = scored
    assert run(None, docs, out) == rows


def test_a_killed_evaluation_ends_equal(
    scored: tuple[list[EvalRow], Path], model: Any, docs: Path, tmp_path: Path
) -> None:
    rows, out = scored
    content = {p.name: p.read_bytes() for p in out.iterdir()}
    for name in ("demo_match.docs.jsonl", "demo_match.json", "demo_rank.docs.jsonl"):  # killed before demo_rank.json
        (tmp_path / name).write_bytes(content[name])
    assert run(model, docs, tmp_path) == rows
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == content


def test_limit_and_no_chat_template(model: Any, docs: Path, tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = None
    rows = run(model, docs, tmp_path, ("demo_bpb", "demo_rank"), limit=2, tokenizer=tokenizer)
    assert [(r.task, r.n) for r in rows] == [("demo_bpb", 2), ("demo_rank", 2)]
    assert rows[0].setup == Setup(limit=2)
    for field in ("chat_template", "multiturn"):
        with pytest.raises(BadRequest, match=rf"evaluate\.{field}: the tokenizer of original has no chat template"):
            evaluate.run(
                lambda: None, tokenizer, ORIGINAL, harness.Tasks(Evaluate.model_validate({field: True}), docs), tmp_path
            )


def test_the_template_can_be_left_out_and_shots_kept_in_one_turn(model: Any, tmp_path: Path) -> None:
    """Both are seen in the prompts' hashes, which differ, and in every row."""
    file, setups, hashes = written(tmp_path / "a.jsonl", arc(8)), [], []
    ways: list[dict[str, Any]] = [{"chat_template": False}, {"multiturn": False}, {}, {"fewshot": "fixed"}]
    for i, fields in enumerate(ways):
        asked = {"data": {"arc_easy": {"test": file}}, "limit": 3, "shots": 2, "seed": 5, **fields}
        row, *_ = run(model, tmp_path, tmp_path / str(i), ("arc_easy",), **asked)
        setups.append((row.setup.chat_template, row.setup.multiturn, row.setup.fewshot))
        assert (row.setup.seed, row.shots, row.setup.comparable) == (5, 2, False)
        hashes.append(json.loads((tmp_path / str(i) / "arc_easy.json").read_text())["lm_eval"]["task_hash"])
    assert setups == [
        (False, False, "drawn"),
        (True, False, "drawn"),
        (True, True, "drawn"),
        (True, True, "fixed"),
    ]
    assert len(set(hashes)) == 4


def test_both_filters_of_gsm8k_are_rows(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = written(tmp_path / "g.jsonl", tiny.problems(12))
    rows = run(model, tmp_path, tmp_path / "out", ("gsm8k",), data={"gsm8k": {"test": file}}, limit=2, shots=1)
    assert [(r.metric, r.filter, r.n, r.chance) for r in rows] == [
        ("exact_match", "strict-match", 2, 0.0),
        ("exact_match", "flexible-extract", 2, 0.0),
    ]
    assert {r.setup.data for r in rows} == {"g.jsonl rows [0, 2); shots from rows [2, 12)"}
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "original: gsm8k: exact_match (strict-match) 0.0% [0.0 to 65.8], exact_match (flexible-extract) 0.0% "
        "[0.0 to 65.8], n = 2"
    ]


def test_missing_data_is_told_before_the_model_is_loaded(docs: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="piqa: its data set baber/piqa .* cannot be had"):
        run(None, docs, tmp_path / "out", ("demo_rank", "piqa"))
    assert not (tmp_path / "out").exists()


def group_of(
    docs: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, aggregate: str, right: dict[str, str] | None = None
) -> None:
    """A group `both` of two tasks, of 4 and of 3 documents; in the second one's file some texts are replaced."""
    from lm_eval.tasks import TaskManager

    lines = (docs / "demo_rank.jsonl").read_text(encoding="utf-8").splitlines()
    for name, count, changes in (("left", 4, {}), ("right", 3, right or {})):
        (folder / f"{name}.jsonl").write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
        config = (harness.PACKAGED / "demo_rank.yaml").read_text(encoding="utf-8")
        moves = {"demo_rank.jsonl": str(folder / f"{name}.jsonl"), "task: demo_rank": f"task: {name}", **changes}
        for old, new in moves.items():
            assert old in config
            config = config.replace(old, new)
        (folder / f"{name}.yaml").write_text(config, encoding="utf-8")
    (folder / "both.yaml").write_text(
        f"group: both\ntask: [left, right]\naggregate_metric_list: [{aggregate}]\nmetadata: {{version: 3}}\n"
    )
    manager = TaskManager(include_path=folder, include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda folder=None: manager)


def test_a_group_with_an_aggregate(model: Any, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As MMLU: parts finished one by one, one row for the whole, weighted by size."""
    group_of(docs, tmp_path, monkeypatch, "{metric: acc, weight_by_size: true}")
    out = tmp_path / "out"
    (row,) = run(model, docs, out, ("both",))
    left, right = (evaluate._read(out, name)[0] for name in ("left", "right"))
    assert (row.task, row.version, row.n, row.chance) == ("both", "3", 7, 0.25)
    assert row.value == pytest.approx((4 * left.value + 3 * right.value) / 7)
    assert [json.loads(line)["task"] for line in (out / row.doc_file).open()] == ["left"] * 4 + ["right"] * 3
    assert run(None, docs, out, ("both",)) == [row]
    (out / "both.json").unlink()
    assert run(None, docs, out, ("both",)) == [row]


def test_a_group_that_does_not_weigh_its_tasks_is_no_share_of_documents(
    model: Any, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its chance is the mean of theirs, and its interval is of its standard error."""
    two = {"doc_to_choice: choices": "doc_to_choice: '{{choices[:2]}}'", "doc_to_target: gold": "doc_to_target: 0"}
    group_of(docs, tmp_path, monkeypatch, "{metric: acc, weight_by_size: false}", two)
    out = tmp_path / "out"
    (row,) = run(model, docs, out, ("both",))
    left, right = (evaluate._read(out, name)[0] for name in ("left", "right"))
    assert (row.value, row.chance) == (pytest.approx((left.value + right.value) / 2), pytest.approx((0.25 + 0.5) / 2))
    assert row.stderr == pytest.approx(math.hypot(left.stderr or 0, right.stderr or 0) / 2) and not row.pooled
    half = 1.96 * (row.stderr or 0)
    assert stats.interval(row) == pytest.approx((max(0, row.value - half), min(1, row.value + half)), abs=1e-3)


@pytest.mark.parametrize(
    ("aggregate", "right"),
    [
        ("{metric: f1}", {}),
        ("{metric: acc}", {"- metric: acc": "- metric: acc_norm"}),
        ("{metric: acc}", {"num_fewshot: 0": "num_fewshot: 1"}),
    ],
    ids=["of a metric that no task has", "of one that not all have", "different shots"],
)
def test_a_group_without_a_sound_aggregate_gives_the_rows_of_its_tasks(
    model: Any,
    docs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    aggregate: str,
    right: dict[str, str],
) -> None:
    group_of(docs, tmp_path, monkeypatch, aggregate, right)
    out = tmp_path / "out"
    rows = run(model, docs, out, ("both",))
    assert [r.task for r in rows] == ["left", "right"] and not (out / "both.json").exists()
    assert capsys.readouterr().out.splitlines()[-1] == (
        "original: both: its tasks differ in metrics or shots, so each counts alone"
    )
    assert run(None, docs, out, ("both",)) == rows


def test_texts_that_the_model_does_not_read_whole_are_counted(model: Any, tmp_path: Path) -> None:
    """Of 1024 positions, in requests that are scored and in those that are written; as the backend cuts them."""
    from hfsd import lm

    lengths = (1, 40, 1000)
    rows = [{**row, "question": "x" * n} for row, n in zip(arc(3), lengths, strict=True)]
    asked = {"arc_easy": {"test": written(tmp_path / "a.jsonl", rows)}}
    cut: list[int] = []
    text = lm.SharedContextLM._text

    def watched(self: Any, context: list[int], continuation: list[int]) -> Any:
        found = text(self, context, continuation)
        cut.append(len(context) + len(continuation) - len(found.tokens))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.SharedContextLM, "_text", watched)
        one, *_ = run(model, tmp_path, tmp_path / "one", ("arc_easy",), data=asked)
    assert (one.setup.truncated, sum(c > 0 for c in cut)) == (1, 4)
    raw = json.loads((tmp_path / "one" / "arc_easy.json").read_text())["lm_eval"]
    assert raw["setup"]["truncated"] == 1
    problems = [{**row, "question": "x" * n} for row, n in zip(tiny.problems(3), (1, 40, 760), strict=True)]
    asked = {"gsm8k": {"test": written(tmp_path / "g.jsonl", problems)}}
    two = run(model, tmp_path, tmp_path / "two", ("gsm8k",), data=asked, shots=0)
    assert [r.setup.truncated for r in two] == [1, 1]  # in each filter's row: 256 tokens are to be written


@pytest.mark.parametrize("extra", [0, 1])
def test_a_text_that_just_fits_is_not_counted(model: Any, tmp_path: Path, extra: int) -> None:
    """The last token is predicted, and not read."""
    lm = evaluate.in_process(model, tiny.tokenizer(), 2048)
    whole = lm.max_length + 1 + extra
    assert evaluate._cut(lm, ("c" * (whole - 4), "last"), "transformers") == bool(extra)
    assert evaluate._cut(lm, ("c" * (1024 - 100 + extra), {"max_gen_toks": 100}), "transformers") == bool(extra)
    assert not evaluate._cut(lm, ("r" * 5000,), "transformers")  # rolling


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_what_is_no_number_is_named(
    model: Any, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    from hfsd.lm import SharedContextLM

    monkeypatch.setattr(SharedContextLM, "loglikelihood", lambda self, requests, **_: [(value, False)] * len(requests))
    first = json.loads((docs / "demo_bpb.jsonl").read_text().splitlines()[0])["id"]
    with pytest.raises(HfsdError) as caught:
        run(model, docs, tmp_path, ("demo_bpb",))
    said = f"demo_bpb on original: bits_per_byte of document {first} is {value}, which is no score"
    assert str(caught.value).startswith(said) and "run again" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_several_texts_of_a_document_are_all_kept() -> None:
    sample = {"doc": {}, "doc_id": 7, "doc_hash": "h", "filter": "none", "metrics": ["acc"], "acc": 1.0}
    responses = [["first", "second"], (-1.5, True), "one", ["only"]]
    line = documents.line("original", "t", {**sample, "filtered_resps": responses})
    assert line["responses"] == [["first", "second"], -1.5, "one", ["only"]] and line["id"] == "7"


def test_twice_the_same_task_is_refused(model: Any, docs: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="demo_rank: asked for by name and in a suite"):
        run(model, docs, tmp_path, ("demo", "demo_rank"))


@pytest.mark.parametrize("content", [None, ""])
def test_no_documents_are_refused(model: Any, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "demo_rank.jsonl").write_text(content)
    with pytest.raises(BadRequest, match="demo_rank: no documents in"):
        run(model, tmp_path, tmp_path / "out", ("demo_rank",))
    assert not (tmp_path / "out").exists()


def test_a_failing_task_is_one_line_and_leaves_nothing(
    model: Any, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfsd.lm import SharedContextLM

    monkeypatch.setattr(SharedContextLM, "loglikelihood", lambda *_, **__: 1 / 0)
    with pytest.raises(HfsdError, match=r"demo_rank on original failed: ZeroDivisionError: division by zero") as caught:
        run(model, docs, tmp_path, ("demo_rank",))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


TWO_TASKS: dict[str, Any] = {"evaluate__tasks": ["demo_rank", "demo_bpb"], "evaluate__limit": 2}


def test_a_killed_evaluation_goes_on_at_the_next_task(
    tiny_run: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It dies in the second variant, between its tasks; results have streamed until there."""
    root = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    asked, write = tiny.recipe(model_folder, **TWO_TASKS), evaluate._write
    made: list[tuple[str, str]] = []

    def dies(out: Path, name: str, *rest: Any) -> None:
        made.append((out.name, name))
        if len(made) == 4:
            raise KeyboardInterrupt
        write(out, name, *rest)

    def lives(out: Path, name: str, *rest: Any) -> None:
        made.append((out.name, name))
        write(out, name, *rest)

    monkeypatch.setattr(evaluate, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(asked, out=root, redo="evaluate", until="evaluate")
    said = [line.split(": ")[:2] for line in capsys.readouterr().out.splitlines()]
    assert said == [["original", "demo_rank"], ["original", "demo_bpb"], ["pruned", "demo_rank"]]
    kept = {p: p.stat().st_mtime_ns for p in (root / "evaluate").glob("*/demo_*.json")}
    made.clear()
    monkeypatch.setattr(evaluate, "_write", lives)
    pipeline.run(asked, out=root, until="evaluate")
    arms = ("sft-gsm-symbolic", "self-distilled-gsm-symbolic")
    assert made == [("pruned", "demo_bpb"), *((arm, task) for arm in arms for task in ("demo_rank", "demo_bpb"))]
    assert kept.items() <= {p: p.stat().st_mtime_ns for p in (root / "evaluate").glob("*/demo_*.json")}.items()
    undisturbed = Path(shutil.copytree(tiny_run, tmp_path / "again", copy_function=shutil.copy2))
    pipeline.run(asked, out=undisturbed, redo="evaluate", until="evaluate")
    for one in (undisturbed / "evaluate").glob("*/scores.json"):
        assert one.read_bytes() == (root / "evaluate" / one.parent.name / "scores.json").read_bytes()


def test_two_processes_give_the_scores_of_one(tiny_run: Path, model_folder: Path, tmp_path: Path) -> None:
    """With drawn shots; all variants, started as torchrun starts them."""
    import yaml

    from hfsd import recipes

    file = written(tmp_path / "a.jsonl", arc(20))
    asked = tiny.recipe(
        model_folder,
        evaluate__tasks=["demo_bpb", "arc_easy"],
        evaluate__limit=3,
        evaluate__shots=2,
        evaluate__data={"arc_easy": {"test": file}},
    )
    one, two = (Path(shutil.copytree(tiny_run, tmp_path / n, copy_function=shutil.copy2)) for n in ("one", "two"))
    pipeline.run(asked, out=one, redo="evaluate", until="evaluate")
    for stage in ("evaluate", "compare", "report", "publish"):
        shutil.rmtree(two / stage)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipes.dump(asked)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "hfsd"]
    home = Path(__file__).parents[1]
    done = subprocess.run(
        [*command, "eval", str(tmp_path / "recipe.yaml"), "--out", str(two)],
        env=os.environ | {"PYTHONPATH": str(home)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ids = sorted(p.parent.name for p in one.glob("evaluate/*/scores.json"))
    assert len(ids) == 4 and ids == sorted(p.parent.name for p in two.glob("evaluate/*/scores.json"))
    for name in ids:
        mine, theirs = (json.loads((root / "evaluate" / name / "scores.json").read_text()) for root in (one, two))
        for a, b in zip(mine, theirs, strict=True):
            assert {**a, "value": 0, "stderr": 0} == {**b, "value": 0, "stderr": 0}
            assert b["value"] == pytest.approx(a["value"], abs=0 if a["task"] == "arc_easy" else 1e-6)
            assert b["stderr"] == pytest.approx(a["stderr"], abs=1e-6)
        hashes = [
            json.loads((r / "evaluate" / name / "arc_easy.json").read_text())["lm_eval"]["task_hash"]
            for r in (one, two)
        ]
        assert hashes[0] == hashes[1]  # every question was asked with the same shots
        assert done.stdout.count(f"{name}: arc_easy: ") == 1


def test_a_variant_is_asked_with_its_own_tokenizer(tiny_run: Path, model_folder: Path, tmp_path: Path) -> None:
    """Its merged checkpoint may bring another one: here, one whose template asks in other words."""
    root = Path(shutil.copytree(tiny_run, tmp_path / "tiny", copy_function=shutil.copy2))
    arm = "sft-gsm-symbolic"
    other = tiny.tokenizer()
    other.chat_template = other.chat_template.replace("assistant", "expert")
    other.save_pretrained(root / "train" / arm / "merged")
    asked = tiny.recipe(model_folder, **TWO_TASKS)
    plan = {s.stage.name: s for s in steps.steps(asked, root)}
    work = session.Session(asked, root, steps.variants(asked))
    hashes = {}
    for name in ("pruned", arm):
        shutil.rmtree(root / "evaluate" / name)
        doing.evaluate(work, plan[f"evaluate/{name}"].stage)
        hashes[name] = json.loads((root / "evaluate" / name / "demo_rank.json").read_text())["lm_eval"]["task_hash"]
    assert len(set(hashes.values())) == 2
