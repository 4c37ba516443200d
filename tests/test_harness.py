"""Which tasks are asked, and how: suites, names, local files in the place of a task's data, shots, missing data."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hfsd import harness, processes, taskfiles
from hfsd.errors import BadRequest
from hfsd.harness import Tasks, Unit
from hfsd.recipe import Evaluate
from tests import tiny

IDS = ("original", "pruned", "sft")
LETTERS = ["A", "B", "C", "D"]


def arc(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows in the columns of ARC."""
    return [
        {
            "id": f"q{i}",
            "question": f"What is {i} and {i % 7}?",
            "choices": {"text": [str(i + i % 7 + d) for d in (0, 1, 2, 3)], "label": LETTERS},
            "answerKey": LETTERS[i % 2],
        }
        for i in range(start, start + count)
    ]


def piqa(count: int) -> list[dict[str, Any]]:
    """Rows in the columns of PIQA."""
    return [{"goal": f"lift {i}", "sol1": f"by {i} hands", "sol2": "by wishing", "label": i % 2} for i in range(count)]


def written(path: Path, rows: list[dict[str, Any]]) -> str:
    """The rows as a file of the kind that its name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


def loaded(name: str, files: dict[str, str], **fields: Any) -> tuple[Any, Any]:
    """A task with local data, ready to be asked, and what is recorded of its data."""
    tasks = Tasks(Evaluate(tasks=(name,), data={name: files}, **fields), Path("nowhere"))
    tasks.load(tasks.units)
    found = tasks.of(tasks.units[0])
    return found.tasks[name], found.local[name]


def prompts(task: Any, limit: int | None = None, **options: Any) -> list[tuple[int, tuple[str, ...]]]:
    task.build_all_requests(limit=limit, **{"rank": 0, "world_size": 1} | options)
    return [(i.doc_id, i.args) for i in task.instances]


def test_suites_have_the_leaderboards_shots_and_gsm8k_its_limit() -> None:
    units = harness.units(Evaluate(tasks=("openllm",)))
    shots = {"arc_challenge": 25, "hellaswag": 10, "truthfulqa_mc2": 0, "mmlu": 5, "winogrande": 5, "gsm8k": 5}
    assert {u.names[0]: u.shots for u in units} == shots and all(u.limit is None for u in units)
    assert harness.units(Evaluate(tasks=("quick", "demo"))) == [
        Unit(("arc_easy",), None, None),
        Unit(("piqa",), None, None),
        Unit(("gsm8k",), None, 100),
        Unit(("demo_match", "demo_rank", "demo_bpb"), None, None),
    ]
    asked = Evaluate(tasks=("quick", "arc_challenge"), shots=3, limit=7)
    assert {(u.shots, u.limit) for u in harness.units(asked)} == {(3, 7)}


def test_unknown_tasks_name_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    known = type("Manager", (), {"all_tasks": ["arc_challenge", "arc_easy", "piqa"], "all_groups": []})
    monkeypatch.setattr(harness, "_manager", known)
    assert harness.check_tasks(["demo", "openllm", "quick", "demo_rank", "mmlu", "piqa", "arc_easy"]) == []
    faults = harness.check_tasks(["demo_rnak", "arc_eazy", "zzzz"])
    assert [f.split(";")[0] for f in faults] == [
        "no suite, task or group 'demo_rnak' (nearest: demo_rank, demo_match, demo)",
        "no suite, task or group 'arc_eazy' (nearest: arc_easy)",
        "no suite, task or group 'zzzz'",
    ]
    with pytest.raises(BadRequest, match=r"evaluate\.tasks: no suite, task or group 'demo_rnak'"):
        Tasks(Evaluate(tasks=("demo_rnak",)), tmp_path)


def test_packaged_names_need_no_lm_eval() -> None:
    code = (
        "import sys; from hfsd import evaluate, harness; from hfsd.recipe import Evaluate;"
        "asked = Evaluate(tasks=['demo', 'openllm', 'arc_easy'], data={'arc_easy': {'test': 'no.csv'}});"
        "assert harness.faults(asked, ['original']) == ['evaluate.data.arc_easy.test: no file no.csv'];"
        "assert harness.suite('demo')[0] == 'demo_match' and harness.suite('piqa') == ('piqa',);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_a_local_file_changes_nothing_else_of_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The requests are, to the letter, those of lm-eval's own task on the same rows in the Hub's splits."""
    import datasets
    from lm_eval.tasks import TaskManager

    test, shots = arc(9), arc(6, start=50)
    files = {"test": written(tmp_path / "t.jsonl", test), "fewshot": written(tmp_path / "s.parquet", shots)}
    task, local = loaded("arc_easy", files, shots=2, seed=3)
    hub = {k: datasets.Dataset.from_list(v) for k, v in (("train", shots), ("validation", shots), ("test", test))}
    monkeypatch.setattr(datasets, "load_dataset", lambda **_: datasets.DatasetDict(hub))
    folder = harness._folder_of("arc_easy")
    stock: Any = TaskManager(include_path=folder, include_defaults=False).load(["arc_easy"])["tasks"]["arc_easy"]
    stock.set_config("num_fewshot", 2)
    stock.set_fewshot_seed(3)
    assert prompts(task) == prompts(stock)
    assert task.VERSION == stock.VERSION and task.dump_config()["doc_to_text"] == stock.dump_config()["doc_to_text"]
    assert local.text == "t.jsonl; shots from s.parquet" and local.comparable
    assert set(local.files) == {"test", "fewshot"} and len(local.files["test"]["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(local.files) + local.text


@pytest.mark.parametrize(
    ("rows", "limit", "shots", "text"),
    [
        (40, None, 2, "t.jsonl rows [0, 36); shots from rows [36, 40)"),  # the last tenth
        (40, None, 6, "t.jsonl rows [0, 33); shots from rows [33, 40)"),  # as many as the shots need
        (40, 5, 6, "t.jsonl rows [0, 5); shots from rows [5, 40)"),  # those behind the evaluated ones
        (40, 38, 2, "t.jsonl rows [0, 36); shots from rows [36, 40)"),  # which are too few here
        (40, 99, 2, "t.jsonl rows [0, 36); shots from rows [36, 40)"),
        (40, None, 0, "t.jsonl"),
        (40, 5, 0, "t.jsonl"),
    ],
)
def test_shots_come_from_rows_that_are_not_evaluated(
    tmp_path: Path, rows: int, limit: int | None, shots: int, text: str
) -> None:
    file = written(tmp_path / "t.jsonl", arc(rows))
    task, local = loaded("arc_easy", {"test": file}, shots=shots, limit=limit)
    assert (local.text, local.comparable) == (text, shots == 0)
    made = prompts(task, limit)
    asked = {row["question"] for row in arc(rows)[: int(text.split(", ")[1].split(")")[0]) if shots else limit]}
    seen = {question for _, (context, _) in made for question in questions(context)[:-1]}
    assert {questions(context)[-1] for _, (context, _) in made} == asked and not seen & asked
    assert all(len(questions(context)) == shots + 1 for _, (context, _) in made)


def questions(context: str) -> list[str]:
    return [line.removeprefix("Question: ") for line in context.splitlines() if line.startswith("Question: ")]


def test_too_few_rows_for_the_shots_are_refused(tmp_path: Path) -> None:
    file, few = written(tmp_path / "t.jsonl", arc(4)), written(tmp_path / "few.jsonl", arc(3))
    with pytest.raises(BadRequest, match=r"test: t\.jsonl has 4 rows, too few for 4 shots .* evaluate\.data\.arc_easy"):
        loaded("arc_easy", {"test": file}, shots=4)
    with pytest.raises(BadRequest, match=r"arc_easy\.fewshot: 3 rows serve as shots, too few for 4"):
        loaded("arc_easy", {"test": file, "fewshot": few}, shots=4)


@pytest.mark.parametrize("name", ["p.jsonl", "p.json", "p.csv", "p.parquet"])
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    task, _ = loaded("piqa", {"test": written(tmp_path / name, piqa(5))})
    assert [dict(doc) for doc in task.eval_docs] == piqa(5)
    assert [task.doc_to_target(doc) for doc in task.eval_docs] == [0, 1, 0, 1, 0]


def test_files_that_do_not_serve_are_one_line(tmp_path: Path) -> None:
    good, other = written(tmp_path / "a.jsonl", arc(9)), written(tmp_path / "p.csv", piqa(9))
    with pytest.raises(BadRequest) as caught:
        loaded("arc_easy", {"test": other})
    assert str(caught.value) == (
        "evaluate.data.arc_easy.test: p.csv does not fit the task (UndefinedError: 'question' is undefined); its "
        "columns are goal, sol1, sol2, label, and the task reads answerKey, choices, question"
    )
    with pytest.raises(BadRequest, match=r"arc_easy\.fewshot: p\.csv does not fit .*'question' is undefined"):
        loaded("arc_easy", {"test": good, "fewshot": other}, shots=1)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"question": \n')
    for name, why in (("empty", "has no rows|cannot be read"), ("broken", "cannot be read: ")):
        with pytest.raises(BadRequest, match=rf"arc_easy\.test: {name}\.jsonl ({why})") as caught:
            loaded("arc_easy", {"test": str(tmp_path / f"{name}.jsonl")})
        assert "\n" not in str(caught.value)


def test_faults_of_local_data_are_known_before_anything_runs(tmp_path: Path) -> None:
    file = written(tmp_path / "a.jsonl", arc(9))
    asked = Evaluate(
        tasks=("arc_easy", "demo"),
        data={
            "arc_esy": {"test": file},
            "arc_easy": {"test": str(tmp_path / "none.csv"), "fewshot": str(tmp_path / "a.txt")},
            "demo": {"test": file},
        },
    )
    assert harness.faults(asked, IDS) == [
        "evaluate.data.arc_esy: is not evaluated (did you mean 'arc_easy'?); evaluate.tasks has arc_easy, demo",
        "evaluate.data.demo: is not evaluated (did you mean 'demo_bpb'?); evaluate.tasks has arc_easy, demo",
        f"evaluate.data.arc_easy.test: no file {tmp_path / 'none.csv'}",
        "evaluate.data.arc_easy.fewshot: a.txt is no .jsonl/.json/.csv/.parquet file",
    ]


def test_files_of_a_groups_tasks_serve_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By lm-eval's index, groups and tags included; and the files' rows are asked."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=harness._folder_of("mmlu_anatomy"), include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda folder=None: manager)
    rows = [{"question": f"Of {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4} for i in range(9)]
    file = written(tmp_path / "m.jsonl", rows)
    asked = Evaluate(tasks=("mmlu",), data={"mmlu_anatomy": {"test": file}})
    assert harness.faults(asked, IDS) == []
    (fault,) = harness.faults(Evaluate(tasks=("mmlu",), data={"mmlu": {"test": file}}), IDS)
    assert fault == "evaluate.data.mmlu: is a group; give the files of its tasks, such as mmlu_abstract_algebra"
    # the group cannot be loaded whole here: which of its data is missing, and which file would serve, is said
    tasks = Tasks(asked, tmp_path)
    with pytest.raises(BadRequest, match=r"^mmlu_\w+: its data set cais/mmlu \(\w+, test, dev\) cannot be had"):
        tasks.load(tasks.units)
    task, local = loaded("mmlu_anatomy", {"test": file}, shots=3)
    first = "The following are multiple choice questions (with answers) about anatomy.\n\nOf 5?"
    assert local.text == "m.jsonl rows [0, 5); shots from rows [5, 9)"
    assert all(context.startswith(first) for _, (context, _) in prompts(task))  # its own sampler: the first ones


def test_a_task_without_documents_and_one_that_cannot_be_loaded_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    file = written(tmp_path / "t.jsonl", arc(3))
    body = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test\n"
        "doc_to_text: question\ndoc_to_target: 0\ndoc_to_choice: '{{choices.text}}'\n"
    )
    (tmp_path / "code.py").write_text(
        "def none(rows):\n    return rows.select([])\ndef far(rows):\n    return [rows[99]]\n"
    )
    (tmp_path / "far.yaml").write_text(
        f"task: far\nprocess_docs: !function code.far\noutput_type: multiple_choice\n{body}"
    )
    (tmp_path / "well.yaml").write_text(f"task: well\noutput_type: multiple_choice\n{body}")
    (tmp_path / "both.yaml").write_text("group: both\ntask: [well, odd]\n")
    (tmp_path / "none.yaml").write_text(
        f"task: none\nprocess_docs: !function code.none\noutput_type: multiple_choice\n{body}"
    )
    (tmp_path / "odd.yaml").write_text(f"task: odd\noutput_type: dance\n{body}")
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(harness, "_manager", lambda folder=None: manager)
    tasks = Tasks(Evaluate(tasks=("none", "odd", "far", "both")), tmp_path)
    with pytest.raises(BadRequest) as caught:
        tasks.load(tasks.units)
    first, second, third, fourth = str(caught.value).splitlines()
    assert first == "none: lm-eval cannot load it: it has no documents; choose other evaluate.tasks"
    assert second.startswith("odd: lm-eval cannot load it: ValueError: Got invalid output_type 'dance'")
    assert third.startswith("far: lm-eval cannot load it: IndexError")  # which is not for want of documents
    assert fourth == second  # and not a fault of `well`, which was loaded before


def test_a_command_line_points_to_a_file(tmp_path: Path, model_folder: Path) -> None:
    from hfsd import recipes

    asked = recipes.dump(tiny.recipe(model_folder))
    made = recipes.validate(asked, "r", ["evaluate.data.arc_easy.test=my.csv", "evaluate.tasks=[arc_easy]"])
    assert made.evaluate.data["arc_easy"].test == "my.csv"


def test_data_that_cannot_be_had_is_named_for_every_task(tmp_path: Path) -> None:
    tasks = Tasks(Evaluate(tasks=("quick",)), tmp_path)
    with pytest.raises(BadRequest) as caught:
        tasks.load(tasks.units)
    lines = str(caught.value).splitlines()
    assert [line.split(" cannot be had: ")[0] for line in lines] == [
        "arc_easy: its data set allenai/ai2_arc (ARC-Easy, test)",
        "piqa: its data set baber/piqa (validation)",
        "gsm8k: its data set openai/gsm8k (main, test, train)",
    ]
    assert lines[1].endswith("file with the columns goal, label, sol1, sol2: --set evaluate.data.piqa.test=FILE")


@pytest.mark.parametrize("where", ["own split", "evaluated split", "a file of shots"])
def test_fixed_shots_are_the_same_for_every_question_and_never_the_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from lm_eval.tasks import TaskManager

    rows, shots = arc(6), arc(4, start=50)
    test, own = written(tmp_path / "t.jsonl", rows), written(tmp_path / "s.jsonl", shots)
    if where == "a file of shots":
        task, _ = loaded("arc_easy", {"test": test, "fewshot": own}, shots=2, fewshot="fixed")
    else:
        (tmp_path / "mine.yaml").write_text(
            "task: mine\ndataset_path: json\noutput_type: multiple_choice\nvalidation_split: validation\n"
            f"dataset_kwargs: {{data_files: {{validation: {test}, train: {own}}}}}\n"
            f"fewshot_split: {'train' if where == 'own split' else 'validation'}\n"
            'doc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_choice: "{{choices.text}}"\n'
            'doc_to_target: "{{choices.label.index(answerKey)}}"\n'
        )
        manager = TaskManager(include_path=tmp_path, include_defaults=False)
        monkeypatch.setattr(harness, "_manager", lambda folder=None: manager)
        tasks = Tasks(Evaluate(tasks=("mine",), shots=2, fewshot="fixed"), tmp_path)
        tasks.load(tasks.units)
        task = tasks.of(tasks.units[0]).tasks["mine"]
    pool = rows if where == "evaluated split" else shots
    for doc_id, (context, _) in prompts(task):
        *seen, asked = questions(context)
        assert asked == rows[doc_id]["question"]
        assert seen == [row["question"] for row in pool if row["question"] != asked][:2]


def test_fixed_shots_that_are_too_few_are_refused(tmp_path: Path) -> None:
    files = {"test": written(tmp_path / "t.jsonl", arc(6)), "fewshot": written(tmp_path / "s.jsonl", arc(1) * 4)}
    with pytest.raises(BadRequest, match=r"evaluate\.fewshot: arc_easy has 1 different shots, and 2 are asked for"):
        loaded("arc_easy", files, shots=2, fewshot="fixed")


def test_processes_share_the_questions_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draws the shots that one process alone would draw for its questions; lm-eval's own ranks draw others."""
    files = {"test": written(tmp_path / "t.jsonl", arc(30))}
    whole = prompts(loaded("arc_easy", files, shots=2)[0], 7)
    monkeypatch.setattr(processes, "count", lambda: 2)
    parts = [prompts(loaded("arc_easy", files, shots=2)[0], 7, rank=rank, world_size=2) for rank in (0, 1)]
    assert sorted(parts[0] + parts[1]) == sorted(whole) and {i for i, _ in parts[1]} == {1, 3, 5}
    with pytest.raises(BadRequest, match="fewer documents than the 2 processes"):
        prompts(loaded("arc_easy", files)[0], 1, rank=1, world_size=2)


def test_each_variant_needs_a_server_of_its_own() -> None:
    one, same = {"url": "http://localhost:1/v1", "model": "m"}, {"url": "http://localhost:1/v1/", "model": "m"}
    asked = Evaluate(engine="endpoint", endpoint={"original": one, "prunde": same})
    assert harness.faults(asked, IDS) == [
        "evaluate.endpoint.prunde: no such variant (did you mean 'pruned'?); there are original, pruned, sft",
        "evaluate.endpoint: no server for pruned, sft; each variant needs one",
        "evaluate.endpoint.prunde: the server and the model of original; each variant is another model",
    ]


def test_a_local_file_is_hashed_once_for_all_variants(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hfsd import steps

    seen: list[Path] = []
    plain = taskfiles.sha256
    monkeypatch.setattr(taskfiles, "sha256", lambda path: seen.append(path) or plain(path))
    file = written(tmp_path / "t.jsonl", arc(3))
    asked = tiny.recipe(model_folder, evaluate__tasks=["arc_easy"], evaluate__data={"arc_easy": {"test": file}})
    assert len([s for s in steps.steps(asked, tmp_path) if s.kind == "evaluate"]) == 4
    assert seen == [Path(file)]


def test_what_cannot_be_asked_is_told_before_a_run_begins(tmp_path: Path, model_folder: Path) -> None:
    """And not after hours of training; a run that ends before its evaluation is not kept from it."""
    from hfsd import pipeline

    if importlib.util.find_spec("vllm"):
        pytest.skip("vLLM is installed here")
    few = {"arc_easy": {"test": written(tmp_path / "t.jsonl", arc(4))}}
    plain, tokenizer = Path(shutil.copytree(model_folder, tmp_path / "model")), tiny.tokenizer()
    (plain / "chat_template.jinja").unlink()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(plain)
    asked = tiny.recipe(
        plain,
        evaluate__tasks=["demo", "arc_easy", "piqa"],
        evaluate__data=few,
        evaluate__shots=4,
        evaluate__chat_template=True,
        evaluate__engine="vllm",
    )
    with pytest.raises(BadRequest) as caught:
        pipeline.run(asked, out=tmp_path / "run")
    vllm, template, rows, missing = str(caught.value).splitlines()
    assert vllm.startswith("evaluate.engine: vllm needs vLLM in this environment")
    assert template.startswith("evaluate.chat_template: the tokenizer in ") and "has no chat template" in template
    assert "t.jsonl has 4 rows, too few for 4 shots" in rows and missing.startswith("piqa: its data set baber/piqa")
    assert not (tmp_path / "run").exists()
    pipeline.run(asked, out=tmp_path / "run", until="prune")
    with pytest.raises(BadRequest, match="piqa: its data set"):  # its training is still ahead
        pipeline.run(asked, out=tmp_path / "run")


def test_packaged_tasks_cost_a_run_no_import(tmp_path: Path, model_folder: Path) -> None:
    import yaml

    from hfsd import recipes

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipes.dump(tiny.recipe(model_folder))))
    code = (
        f"import sys; from hfsd import pipeline; r, _ = pipeline.read({str(tmp_path / 'recipe.yaml')!r}, None);"
        "pipeline._try_tasks(r); print([m for m in ('torch', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_what_scores_depend_on_is_the_files_bytes(tmp_path: Path) -> None:
    from hfsd.recipe import TaskFiles

    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, moved = (written(tmp_path / d / "t.jsonl", arc(3)) for d in "ab")
    seen = taskfiles.hashes({"arc_easy": TaskFiles(test=first)})
    assert seen == taskfiles.hashes({"arc_easy": TaskFiles(test=moved)})
    written(Path(moved), arc(4))
    assert seen != taskfiles.hashes({"arc_easy": TaskFiles(test=moved)})
