"""Our backend of lm-eval beside its own `hf` on real tasks, and the memory of all variants of a run together.

Set HFSD_EVAL_DATA to a folder with arc_challenge.jsonl, arc_easy.jsonl and piqa.jsonl, the sets with the Hub's columns.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hfsd import models, surgery
from tests.bench.conftest import Table, in_turn, peak

DATA = os.environ.get("HFSD_EVAL_DATA")
pytestmark = [
    pytest.mark.bench,
    pytest.mark.skipif(not DATA, reason="HFSD_EVAL_DATA names no folder with arc_challenge.jsonl, ..."),
]
SIZES = (1, 4, 8, 16)  # stock batches
TOLERANCE = 1e-4  # nats
ROUNDS = 2  # in which ours and the best of stock take turns, after one of all

ARC = (
    "doc_to_text: 'Question: {{question}}\n\n  Answer:'\ndoc_to_target: '{{choices.label.index(answerKey)}}'\n"
    "doc_to_choice: '{{choices.text}}'\n"
)
PIQA = "doc_to_text: 'Question: {{goal}}\n\n  Answer:'\ndoc_to_target: label\ndoc_to_choice: '{{[sol1, sol2]}}'\n"
LETTERS = (  # as MMLU: the choices are in the question, their letters are scored, the first shots are everyone's
    'doc_to_text: \'{{question}}{% for c in choices.text %}\n\n  {{"ABCD"[loop.index0]}}. {{c}}{% endfor %}\n\n'
    "  Answer:'\ndoc_to_target: '{{choices.label.index(answerKey)}}'\ndoc_to_choice: [A, B, C, D]\n"
    "fewshot_config: {sampler: first_n}\n"
)
TASKS = {"arc_challenge": ARC, "arc_easy": ARC, "piqa": PIQA, "letters": LETTERS}


@pytest.fixture(scope="module")
def loaded(demo_folder: Path) -> tuple[Any, Any]:
    return models.load(demo_folder, "float32"), models.load_tokenizer(demo_folder)


def write_task(folder: Path, name: str, shots: int, documents: int) -> None:
    """A task of the first documents of a set, with shots from those behind them."""
    source = Path(DATA or "", "arc_challenge.jsonl" if name == "letters" else f"{name}.jsonl")
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    if name == "letters":
        rows = [row for row in rows if row["choices"]["label"] == list("ABCD")]
    for split, part in (("test", rows[:documents]), ("train", rows[documents:])):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    files = f"{{test: {folder / 'test.jsonl'}, train: {folder / 'train.jsonl'}}}"
    (folder / f"{name}.yaml").write_text(
        f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {files}}}\ntest_split: test\n"
        f"training_split: train\nfewshot_split: train\noutput_type: multiple_choice\nnum_fewshot: {shots}\n"
        f"{TASKS[name]}metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]\n"
    )


def beside_stock(
    loaded: tuple[Any, Any], folder: Path, table: Table, name: str, shots: int, documents: int, at_least: float
) -> None:
    from lm_eval import evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from hfsd.lm import SharedContextLM

    write_task(folder, name, shots, documents)
    task = TaskManager(include_path=str(folder), include_defaults=False).load([name])
    task["tasks"][name].set_fewshot_seed(seed=0)
    model, tokenizer = loaded
    lms: dict[str, Any] = {
        f"stock{size}": HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size) for size in SIZES
    }
    lms["ours"] = SharedContextLM(model, tokenizer)
    results: dict[str, Any] = {}

    def work(which: str) -> None:
        task["tasks"][name].set_fewshot_seed(seed=0)  # drawn shots: the same for all
        results[which] = evaluate(lms[which], task, bootstrap_iters=0)

    least = in_turn(1, **{which: lambda which=which: work(which) for which in lms})
    best = min((which for which in lms if which != "ours"), key=lambda which: least[which])
    again = in_turn(ROUNDS - 1, **{which: lambda which=which: work(which) for which in (best, "ours")})
    least |= {which: min(least[which], seconds) for which, seconds in again.items()}
    scores = {which: found["results"][name]["acc,none"] for which, found in results.items()}
    alike = {which: nats(found, name) for which, found in results.items()}
    apart = farthest(alike["stock1"], alike["ours"])  # text by text: no padding
    own = max(farthest(alike[best], alike[which]) for which in lms if which != "ours")
    ratio = least[best] / least["ours"]
    shown: list[tuple[object, ...]] = [("backend, batch", "seconds", "accuracy")]
    shown += [(which, f"{seconds:.1f}", f"{scores[which]:.4f}") for which, seconds in least.items()]
    shown += [(f"{best} over ours", f"{ratio:.2f} x", "")]
    shown += [("ours and stock, text by text", "", f"log-likelihoods to {apart:.1e}")]
    shown += [("stock's batch sizes among themselves", "", f"log-likelihoods to {own:.1e}")]
    load = " ".join(f"{x:.1f}" for x in os.getloadavg())
    table(f"{name}, {shots} shots, {documents} documents, SmolLM2-135M, float32; load {load}", shown)
    assert len(set(scores.values())) == 1
    # of texts of 200 tokens, float32 may make stock differ from itself by a little more
    assert apart <= min(max(TOLERANCE, own), 2 * TOLERANCE)
    assert ratio >= at_least


def nats(result: Any, name: str) -> list[float]:
    samples = sorted(result["samples"][name], key=lambda sample: sample["doc_id"])
    return [response[0] for sample in samples for response in sample["filtered_resps"]]


def farthest(some: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(some, others, strict=True))


@pytest.mark.timeout(7200)
@pytest.mark.parametrize(
    ("name", "shots", "documents", "at_least"),
    [("arc_challenge", 25, 12, 2.5), ("arc_easy", 0, 200, 2.0), ("piqa", 0, 100, 1.1), ("letters", 5, 60, 2.0)],
)
def test_our_backend_beside_lm_evals(
    loaded: tuple[Any, Any], tmp_path: Path, table: Table, name: str, shots: int, documents: int, at_least: float
) -> None:
    beside_stock(loaded, tmp_path, table, name, shots, documents, at_least)


MEMORY = """
import json, sys
from pathlib import Path
def prepare():
    import lm_eval.tasks, peft
    import hfsd.family, hfsd.lm
def work():
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager
    from hfsd import models
    from hfsd.family import Family
    from hfsd.lm import SharedContextLM
    folder, task, kept, *adapters = sys.argv[1:]
    original, tokenizer = models.load(Path(folder), "float32"), models.load_tokenizer(Path(folder))
    family = Family(original, json.loads(kept), {Path(a).name: Path(a) for a in adapters}) if adapters else None
    manager = TaskManager(include_path=task, include_defaults=False)
    for variant in family.ids if family else ["original"]:
        lm = lambda model: SharedContextLM(model, tokenizer)
        if family is None:
            evaluate(lm(original), manager.load(["arc_easy"]), bootstrap_iters=0)
            continue
        with family.use(variant) as model:
            evaluate(lm(model), manager.load(["arc_easy"]), bootstrap_iters=0)
"""


@pytest.mark.timeout(1800)
def test_memory_of_all_variants(demo_folder: Path, tmp_path: Path, table: Table) -> None:
    """Original, pruned and two arms on one set of weights, each evaluated on a few documents."""
    from peft import LoraConfig, get_peft_model

    original = models.load(demo_folder, "float32")
    kept = [i for i in range(original.config.num_hidden_layers) if not 12 <= i < 16]
    config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    arms = [tmp_path / arm for arm in ("sft", "self-distilled")]
    for arm in arms:
        get_peft_model(surgery.view(original, kept), config).save_pretrained(arm)
    del original
    write_task(tmp_path, "arc_easy", 0, 12)
    arguments = (str(demo_folder), str(tmp_path), json.dumps(kept))
    alone = peak(MEMORY, *arguments)["above"]
    together = peak(MEMORY, *arguments, *map(str, arms))["above"]
    adapters = sum(arm.joinpath("adapter_model.safetensors").stat().st_size for arm in arms) / 1e6
    bound = 1.25 * alone + adapters
    shown: list[tuple[object, ...]] = [("variants in memory", "MB over the imports")]
    shown += [("original alone", f"{alone:.0f}"), ("original, pruned, two arms", f"{together:.0f}")]
    shown += [("adapters on disk", f"{adapters:.0f}"), ("1.25 x the original + adapters", f"{bound:.0f}")]
    table("evaluating 12 documents of ARC-Easy, SmolLM2-135M, float32", shown)
    assert together <= bound
