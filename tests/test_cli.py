"""The command line: cheap help, exit codes, one line per error, one JSON line."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hfsd import recipes
from hfsd import rewrite as rewriting
from hfsd.blocks_recovery import Rewrite
from hfsd.cli import app
from hfsd.records import Example
from tests import tiny

HEAVY = {"torch", "transformers", "trl", "peft", "gradio", "datasets", "lm_eval", "matplotlib", "huggingface_hub"}


def test_help_is_cheap_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom hfsd.cli import app\n"
        "try: app(['--help'])\nexcept SystemExit: pass\n"
        f"print('HEAVY', sorted(set(sys.modules) & {HEAVY!r}))"
    )
    seconds = []
    for _ in range(3):  # the least of three: other work on the machine only adds
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "HEAVY []" in done.stdout and "self-data distillation" in done.stdout
    assert min(seconds) <= 0.5, seconds


def test_the_public_api_is_imported_when_it_is_used() -> None:
    code = (
        "import sys, hfsd\n"
        f"assert not set(sys.modules) & {HEAVY!r}\n"
        "assert callable(hfsd.run) and callable(hfsd.results) and callable(hfsd.push) and hfsd.Family\n"
        "runs = [getattr(hfsd, s) for s in hfsd.STAGES]\n"
        "assert all(callable(getattr(m, 'run', None) or m.write) for m in runs)\n"
        "try: hfsd.nothing\nexcept AttributeError as e: print(e)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'hfsd' has no attribute 'nothing'\n"


def test_every_command_is_there() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    for name in "run scan prune rewrite train merge eval compare report push space init recipe".split():
        assert f"\n  {name} " in shown, name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "nowhere"], "hfsd: recipe 'nowhere': no such file or packaged recipe"),
        (["run", "demo", "--set", "prune.blcks=2"], "hfsd: demo: prune.blcks: unknown key (did you mean 'blocks'?)"),
        (["run", "demo", "--until", "trian"], "hfsd: --until trian: no such stage (did you mean 'train'?)"),
        (["recipe", "dmo"], "hfsd: no packaged recipe 'dmo' (did you mean 'demo'?)"),
        (["report", "nowhere"], "hfsd: nowhere holds no finished report"),
        (["space", "nowhere"], "hfsd: nowhere holds no staged Space"),
        (["push", "nowhere", "--to", "me"], "hfsd: nowhere holds no finished report"),
        (["prune", "nowhere.gguf", "--remove", "1:2", "--out", "x"], "hfsd: model.path: no file nowhere.gguf"),
        (["prune", "m", "--remove", "2:1", "--out", "x"], "hfsd: arguments: prune.remove: '2:1' is no range"),
        (["prune", "m", "--blocks", "2", "--out", "x"], "hfsd: --blocks chooses by a scan: give --calibration"),
        (["prune", "m", "--keep", "3,1", "--out", "x"], "hfsd: arguments: prune.keep: '3,1' is no list of blocks"),
        (["prune", "m", "--out", "x"], "hfsd: give one of --blocks COUNT, --remove START:STOP and --keep BLOCKS"),
        (
            ["scan", "m", "--calibration", "t.txt", "--widths", "3", "--out", "x"],
            "hfsd: arguments: scan.widths: '3' is",
        ),
        (
            ["scan", "m", "--calibration", "t.txt", "--metric", "l2", "--out", "x"],
            "hfsd: arguments: scan.metric: input",
        ),
        (
            ["prune", "m", "--remove", "1:2", "--set", "prune.remove=2:3", "--out", "x"],
            "hfsd: --set prune.remove=2:3 con",
        ),
        (
            ["prune", "m", "--remove", "1:2", "--set", "nonsense.x=3", "--out", "x"],
            "hfsd: arguments: nonsense: unknown",
        ),
        (
            ["scan", "m", "--calibration", "t.txt", "--search", "greedy", "--out", "x"],
            "hfsd: --select and --search choo",
        ),
        (["init", "nowhere.gguf", "gym:gsm_symbolic"], "hfsd: model.path: no file nowhere.gguf"),
    ],
)
def test_bad_requests_exit_with_2_and_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert result.stderr.startswith(message) and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output and not [
        p for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"
    ]


def test_json_closes_with_one_line_also_on_errors(tiny_run: Path) -> None:
    result = CliRunner().invoke(app, ["report", str(tiny_run), "--json"])
    closing = json.loads(result.stdout.splitlines()[-1])
    assert closing["ok"] and set(closing["variants"]) == {
        "original",
        "pruned",
        "sft-gsm-symbolic",
        "self-distilled-gsm-symbolic",
    }
    failed = CliRunner().invoke(app, ["report", "nowhere", "--json"])
    assert json.loads(failed.stdout.splitlines()[-1])["exit_code"] == failed.exit_code == 2


def test_debug_shows_the_traceback() -> None:
    result = CliRunner().invoke(app, ["report", "nowhere", "--debug"])
    assert type(result.exception).__name__ == "BadRequest"


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfsd import pipeline

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    result = CliRunner().invoke(app, ["run", "demo"])
    assert result.exit_code == 130 and "run the same command again to continue" in result.stderr


def test_an_unforeseen_error_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from hfsd import pipeline

    def broken(*_: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(pipeline, "run", broken)
    result = CliRunner().invoke(app, ["run", "demo"])
    assert result.exit_code == 1 and result.stderr == "hfsd: ValueError: two lines; --debug shows where\n"


def test_the_closing_table_and_next_commands(tiny_run: Path) -> None:
    shown = CliRunner().invoke(app, ["report", str(tiny_run)], env={"COLUMNS": "200"}).stdout
    assert (
        "self-distilled" in shown and f"hfsd space {tiny_run}" in shown and f"hfsd push {tiny_run} --to NAME" in shown
    )


def test_a_second_run_is_quick(tiny_run: Path) -> None:
    """The whole process, imports included, in less than 2 s over the bare import of the command line."""
    code = "from hfsd.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(tiny_run / "recipe.yaml"), "--out", str(tiny_run), "--json"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "160"})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert json.loads(done.stdout.splitlines()[-1])["ok"]
    assert after.ru_utime - before.ru_utime < 2.5


def test_prune_and_scan_by_hand(model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "cut"
    result = CliRunner().invoke(app, ["prune", str(model_folder), "--remove", "1:3", "--out", str(out), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["sentence"].startswith("removes blocks [1, 3) of 6")
    again = CliRunner().invoke(app, ["prune", str(model_folder), "--remove", "1:3", "--out", str(out)])
    assert again.exit_code == 2 and "is there already" in again.stderr
    rows = tiny.data_file(tmp_path / "rows.jsonl", 60)
    words = ["scan", str(model_folder), "--calibration", str(rows), "--blocks", "2", "--out", str(tmp_path / "scan")]
    result = CliRunner().invoke(app, [*words, "--set", "scan.rows=4", "--set", "scan.verify_rows=2"])
    assert result.exit_code == 0, result.output
    scores = json.loads((tmp_path / "scan" / "scores.json").read_text())
    assert set(scores) == {"metric", "tokens", "samples", "n_tokens", "values"} and len(scores["values"]["2"]) == 5


def test_scan_alone_scores_and_chooses_nothing(model_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Six eggs and four cups. " * 40)
    words = ["scan", str(model_folder), "--calibration", str(text), "--out", str(tmp_path / "out")]
    words += ["--rows", "5", "--max-length", "64", "--widths", "1:4", "--metric", "bi", "--tokens", "last", "--json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    closing = json.loads(result.stdout.splitlines()[-1])
    assert closing["kept"] is None and "scored every range" in closing["sentence"]
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert (scores["metric"], scores["tokens"], scores["samples"], scores["n_tokens"]) == ("bi", "last", 5, 5)
    assert {w: len(v) for w, v in scores["values"].items()} == {"1": 6, "2": 5, "3": 4}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["scores.json", "scores.png"]
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "is there already" in again.stderr


def test_prune_chooses_by_a_scan_keeps_by_hand_and_copies(model_folder: Path, tmp_path: Path) -> None:
    rows = tiny.data_file(tmp_path / "rows.jsonl", 60)
    sets = [word for item in ("scan.rows=4", "scan.verify_rows=2") for word in ("--set", item)]

    def prune(out: str, *words: str) -> dict:
        result = CliRunner().invoke(app, ["prune", str(model_folder), "--out", str(tmp_path / out), "--json", *words])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout.splitlines()[-1])

    chosen = prune("chosen", "--blocks", "2", "--calibration", str(rows), *sets)
    history = json.loads((tmp_path / "chosen" / "hfsd.json").read_text())
    assert chosen["sentence"].endswith("keeps 4") and len(history["kept"]) == 4
    assert {"loss", "original_loss", "angular_all", "angular_last"} <= set(history["cuts"][0]["scores"])
    kept = prune("kept", "--keep", "0,2,5", "--max-shard-size", "20KB")
    assert kept["sentence"].startswith("removes blocks {1, 3, 4} of 6")
    assert len(list((tmp_path / "kept").glob("*.safetensors"))) > 1
    assert prune("copy", "--blocks", "0")["sentence"] == "removes no block of 6; keeps 6"
    assert {"copy", "structure", "numeric", "hash"} == set(kept["seconds"])


def test_rewriting_by_hand_prunes_nothing(model_folder: Path, tmp_path: Path) -> None:
    rows, out = tiny.data_file(tmp_path / "rows.jsonl", 40), tmp_path / "rewritten"
    words = ["rewrite", str(model_folder), str(rows), "--mode", "reference", "--rows", "3", "--out", str(out), "--json"]
    result = CliRunner().invoke(app, [*words, "--set", "rewrite.max_new_tokens=8"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.splitlines()[-1])["rows"] == 3
    assert {p.name for p in out.iterdir() if p.is_dir()} == {"rewrite"}


def test_rewrites_are_shown_side_by_side(tiny_run: Path, tmp_path: Path) -> None:
    for place in (tiny_run, tiny_run / "rewrite"):
        shown = CliRunner().invoke(app, ["rewrite", str(place), "--show", "3"], env={"COLUMNS": "120"})
        assert shown.exit_code == 0, shown.output
        assert shown.stdout.count("reference") >= 3 and "rows: " in shown.stdout
    for words, message in (
        (["rewrite", "m"], "give the DATA to rewrite, or --show COUNT"),
        (["rewrite", "m", "d.jsonl"], "give a folder for the rewrites: --out FOLDER"),
        (["rewrite", str(tmp_path), "--show", "2"], "holds no finished rewrites"),
    ):
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 2 and message in result.stderr


def _rewritten(folder: Path) -> Path:
    """A finished rewrite folder: three rejected rows, then two accepted ones."""
    given = [Example(f"r{i}", "How many?", "There are two eggs") for i in range(5)]
    texts = ["There are nine pears", *["There are nine eggs"] * 2, *["There are two brown eggs"] * 2]
    (folder / "mine.jsonl").write_text(
        "".join(json.dumps({"id": row.id, "text": text}) + "\n" for row, text in zip(given, texts, strict=True))
    )
    asked = Rewrite(**{"from": str(folder / "mine.jsonl"), "check": "exact", "min_similarity": 0.0, "max_growth": None})
    accepted = [replace(row, answer=text if int(row.id[1]) > 2 else "") for row, text in zip(given, texts, strict=True)]
    rewriting.run(lambda: pytest.fail("no engine is needed"), accepted, [], asked, "key", folder)
    return folder


def test_rewrites_are_shown_in_turn_and_in_colours(tmp_path: Path) -> None:
    words = ["rewrite", str(_rewritten(tmp_path)), "--show"]
    plain = CliRunner().invoke(app, [*words, "4"], env={"COLUMNS": "120"})
    titles = re.findall(r"^(r\d)  (.+?) *$", plain.stdout, re.MULTILINE)
    assert titles == [("r3", "kept"), ("r0", "wrong answer"), ("r4", "kept"), ("r1", "wrong answer")], plain.output
    everything = CliRunner().invoke(app, [*words, "9"], env={"COLUMNS": "120"})
    assert re.findall(r"^(r\d)  ", everything.stdout, re.MULTILINE) == ["r3", "r0", "r4", "r1", "r2"]
    assert "\x1b[" not in plain.stdout

    coloured = {"COLUMNS": "120", "FORCE_COLOR": "1", "TERM": "xterm", "NO_COLOR": None}
    shown = CliRunner().invoke(app, [*words, "2"], env=coloured)
    red, green = ({w.strip() for w in re.findall(rf"\x1b\[{n}m([^\x1b]*)\x1b", shown.stdout)} for n in (31, 32))
    # of one side only: the accepted one adds a word, the rejected one has two others
    assert (red - {""}, green - {""}) == ({"two", "eggs"}, {"brown", "nine", "pears"})
    assert re.sub(r"\x1b\[[\d;]*m", "", shown.stdout).count("There are") == 4


def test_init_prints_a_recipe_that_parses(model_folder: Path, tmp_path: Path) -> None:
    rows = tiny.data_file(tmp_path / "rows.jsonl")
    result = CliRunner().invoke(app, ["init", str(model_folder), str(rows), "--blocks", "2"])
    made = recipes.parse(result.stdout)
    assert made.rewrite.task == "math" and made.prune.blocks == 2 and made.data[0].source == str(rows)
    assert (
        "prompt from question, reference from answer" in result.stdout and "# of 6; the scan chooses" in result.stdout
    )
    too_many = CliRunner().invoke(app, ["init", str(model_folder), str(rows), "--blocks", "6"])
    assert too_many.exit_code == 2 and "1 to 5 can go" in too_many.stderr


@pytest.mark.parametrize("name", recipes.packaged())
def test_recipe_prints_the_packaged_text(name: str) -> None:
    result = CliRunner().invoke(app, ["recipe", name])
    assert recipes.parse(result.stdout).name == name
