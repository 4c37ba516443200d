"""How much each step computes: rewriting, training, evaluation and comparison, from lengths that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfsd import drafts, steps, workload
from hfsd.workload import Lengths, Work
from tests import tiny


def _rows(name: str, prompt: float, rows: int = 40) -> Lengths:
    asked = {"self": prompt, "reference": 2 * prompt, "few-shot": 10 * prompt}
    return Lengths(name, rows, prompt, prompt, round(2 * prompt), 30, "made up", asked)


def _work(recipe: Any, rows: list[Lengths], depth: int = 30) -> dict[str, list[Work]]:
    names = [s.stage.name for s in steps.steps(recipe, Path("runs"))]
    made = workload.of_steps(recipe, names, steps.variants(recipe), rows, depth)
    return {name: [w for w in made if w.step == name] for name in dict.fromkeys(w.step for w in made)}


def test_rewriting_sums_its_modes_with_shots_and_likelihoods(model_folder: Path) -> None:
    found = _work(tiny.recipe(model_folder, rewrite__mode="best"), [_rows("gsm-symbolic", 100)])["rewrite"]
    prompts = 40 * (100 + 200 + 1000) + drafts.SHOT_ROWS * 200
    scored = 200 * (3 * 40 + drafts.SHOT_ROWS) + 200 * (40 + drafts.SHOT_ROWS)  # drafts, and each reference once
    assert sum(w.forward for w in found) == prompts + scored
    assert sum(w.passes for w in found) == (3 * 40 / 4 + drafts.SHOT_ROWS / 4) * 12
    assert [w.unknown for w in _work(_vllm(model_folder), [_rows("gsm-symbolic", 9)])["rewrite"]] == [
        "computed by vllm, which is not measured"
    ]


def _vllm(folder: Path) -> Any:
    return tiny.recipe(folder, rewrite__engine="vllm", evaluate__engine="vllm")


def test_each_data_set_has_its_own_lengths(model_folder: Path, tmp_path: Path) -> None:
    files = [str(tiny.data_file(tmp_path / f"{name}.jsonl")) for name in ("short", "long")]
    recipe = tiny.recipe(model_folder, data=[{"source": f, "rows": 8} for f in files])
    found = _work(recipe, [_rows("short", 10, rows=8), _rows("long", 70, rows=8)])
    assert [w.trained for w in found["train/sft-short"]] == [8 * 20]
    assert [w.trained for w in found["train/sft-long"]] == [8 * 140]
    assert sum(w.forward for w in found["rewrite/long"]) == 7 * sum(w.forward for w in found["rewrite/short"])
    assert [one.data for one in workload.lengths(recipe)] == ["short", "long"]


def test_lengths_count_the_prompts_that_rewriting_gives(model_folder: Path) -> None:
    (found,) = workload.lengths(tiny.recipe(model_folder))
    assert found.asked["self"] == pytest.approx(found.prompt, rel=0.1)
    # the tiny tokenizer's tokens are bytes: the template's own words count, and each worked rewrite
    assert found.asked["reference"] > found.prompt + found.reference + 50
    assert found.asked["few-shot"] > 3 * found.asked["reference"]


def test_evaluation_of_public_tasks_is_estimated(model_folder: Path, tmp_path: Path) -> None:
    rows = [_rows("gsm-symbolic", 100)]
    recipe = tiny.recipe(model_folder, evaluate__tasks=["openllm"], evaluate__limit=None)
    found = _work(recipe, rows)["evaluate/original"]
    assert len(found) == 6 and not any(w.unknown for w in found)
    arc = workload.TASKS["arc_challenge"]
    assert found[0].forward == 1172 * (arc.context + 25 * (arc.context + arc.choice) + 4 * arc.choice)
    assert found[5].bound and found[5].passes * found[5].rows >= 1319 * workload.GENERATED  # of gsm8k
    limited = _work(tiny.recipe(model_folder, evaluate__tasks=["openllm"], evaluate__limit=10), rows)
    assert limited["evaluate/original"][0].forward == found[0].forward * 10 / 1172
    fixed = _work(recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"fewshot": "fixed"})}), rows)
    assert fixed["evaluate/original"][0].forward < found[0].forward / 10
    unknown = _work(tiny.recipe(model_folder, evaluate__tasks=["piqa", "xnli_de"]), rows)["evaluate/original"]
    assert [w.unknown for w in unknown] == ["", "the size of xnli_de is not known here"]
    assert {w.unknown for w in _work(_vllm(model_folder), rows)["evaluate/pruned"]} == {
        "computed by vllm, which is not measured"
    }


def test_evaluation_counts_local_files(model_folder: Path, tmp_path: Path) -> None:
    file = tiny.data_file(tmp_path / "arc.jsonl", 40)
    given = {"arc_challenge": {"test": str(file)}}
    options = {"evaluate__tasks": ["arc_challenge"], "evaluate__data": given, "evaluate__limit": None}
    arc = workload.TASKS["arc_challenge"]
    found = _work(tiny.recipe(model_folder, **options), [_rows("gsm-symbolic", 9)])["evaluate/original"]
    assert found[0].forward == 40 * (arc.context + 4 * arc.choice)
    shot = _work(tiny.recipe(model_folder, **options, evaluate__shots=5), [_rows("gsm-symbolic", 9)])
    assert shot["evaluate/original"][0].forward / (6 * arc.context + 9 * arc.choice) == pytest.approx(34)


def test_comparing_asks_the_original_again_for_whole_checkpoints(model_folder: Path) -> None:
    rows = [_rows("gsm-symbolic", 100)]
    lora = _work(tiny.recipe(model_folder), rows)["compare"]
    full = _work(tiny.recipe(model_folder, train__method="full", train__lora={}), rows)["compare"]
    along = 3 * 2 * (100 + 8)  # three texts, two prompts
    assert lora[0].forward == 2 * 2 * 100 + along
    assert full[0].forward == lora[0].forward + 2 * along
    assert lora[1].forward == 3 * (2 * 100 + along)  # pruned, and two arms
    assert lora[1].passes == 3 * 8 and lora[0].passes == 2 * 8
    assert {w.rows for w in lora[2:]} == {1} and all(w.passes for w in lora)  # drafts and turns, one text at a time
