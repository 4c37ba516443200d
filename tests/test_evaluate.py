"""Evaluation: our backend against lm-eval's own, resumption, files, refusals."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hfsd import evaluate, taskdata
from hfsd.errors import BadRequest, HfsdError
from hfsd.recipe import Evaluate
from hfsd.records import EvalRow, Variant
from tests import tiny
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
    return evaluate.run(model, tiny.tokenizer(), ORIGINAL, Evaluate(tasks=tasks, **fields), docs, out)


@pytest.fixture(scope="module")
def scored(model: Any, docs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[EvalRow], Path]:
    out = tmp_path_factory.mktemp("out")
    return run(model, docs, out), out


def instances(requests: list[tuple[str, str]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(requests)]


REQUESTS = [
    *(("Two and two are", choice) for choice in (" four", " five", " fourteen", " 4", " four")),
    *(("One letter:", choice) for choice in ("A", "B", "C", "D")),  # choices of one token
    *(("A prefix of another:", choice) for choice in (" long", " longer and longer", " l")),
    ("No relatives,", " one choice."),
    ("The same text", " as a longer context's"),
    ("The same text as", " a longer context's"),
    ("", "no context at all"),
    ("trailing space ", "moves to the choice"),
    *(("x" * 1500, choice) for choice in ("too long", "too long to read")),  # past the model's 1024 positions
]


@pytest.mark.parametrize("batch_tokens", [2048, 16])
def test_log_likelihoods_equal_lm_evals_own(model: Any, batch_tokens: int) -> None:
    from lm_eval.models.huggingface import HFLM

    from hfsd.lm import SharedContextLM

    # with its cache of logits, lm-eval 0.4.13 mis-scores one text that is split at two places (REQUESTS has one)
    stock = HFLM(pretrained=model, tokenizer=tiny.tokenizer(), batch_size=1, logits_cache=False)
    ours = SharedContextLM(model, tiny.tokenizer(), batch_tokens)
    assert ours.shares
    wanted, found = (lm.loglikelihood(instances(REQUESTS), disable_tqdm=True) for lm in (stock, ours))
    for pair, (a, greedy_a), (b, greedy_b) in zip(REQUESTS, wanted, found, strict=True):
        assert b == pytest.approx(a, abs=1e-4), pair
        assert greedy_a == greedy_b, pair
    texts = [("some text to roll over",), ("another one",), ("y" * 1200,)]
    rolling = [lm.loglikelihood_rolling(instances(texts), disable_tqdm=True) for lm in (stock, ours)]
    assert rolling[1] == pytest.approx(rolling[0], abs=1e-3)  # sums over a thousand tokens


def test_a_large_vocabulary_is_scored_as_lm_eval_does() -> None:
    """In float32, how a softmax over 50,000 logits is summed shows in the fifth digit of every token."""
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM

    from hfsd.lm import SharedContextLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    wide = LlamaForCausalLM(config)
    with torch.no_grad():
        wide.lm_head.weight.mul_(100)  # logits as spread as a trained model's
    requests = [("context", choice * 60) for choice in (" one", " two")]
    lms = (HFLM(pretrained=wide, tokenizer=tiny.tokenizer()), SharedContextLM(wide, tiny.tokenizer()))
    wanted, found = ([a for a, _ in lm.loglikelihood(instances(requests), disable_tqdm=True)] for lm in lms)
    assert found == pytest.approx(wanted, abs=1e-4)


def test_a_greedy_continuation_is_seen(model: Any) -> None:
    """Both backends say that a text is what the model would write, also when it is a fork and not the stem."""
    import torch

    from hfsd.lm import SharedContextLM

    tokenizer = tiny.tokenizer()
    ids = tokenizer("Greedy:", return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)[0, ids.shape[1] :]
    requests = [((" ", " "), ids[0].tolist(), list(tail)) for tail in (written.tolist(), [5] * 40, [5] * 39 + [6])]
    lm = SharedContextLM(model, tokenizer)
    lm.cache_hook = type("Hook", (), {"add_partial": lambda *_: None})()
    assert [greedy for _, greedy in lm._loglikelihood_tokens(requests)] == [True, False, False]


def test_a_shared_context_is_computed_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfsd.lm import SharedContextLM

    read: list[int] = []
    plain = SharedContextLM._forward

    def counting(self: Any, inputs: Any, keep: int, cache: Any = None) -> Any:
        read.append(sum(map(len, inputs)))
        return plain(self, inputs, keep, cache)

    lm = SharedContextLM(model, tiny.tokenizer())
    monkeypatch.setattr(SharedContextLM, "_forward", counting)
    lm.loglikelihood(instances([("c" * 400, f" same{i}") for i in range(4)]))
    assert sum(read) <= 400 + 4 * len(" same0")


@pytest.mark.parametrize("kind", ["sliding", "dynamic-rope"])
def test_other_caches_take_lm_evals_path(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from lm_eval.models.huggingface import HFLM
    from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

    from hfsd.lm import SharedContextLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": tiny.VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
    }
    if kind == "sliding":
        other: Any = MistralForCausalLM(MistralConfig(**sizes, sliding_window=8))
    else:
        scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
        other = LlamaForCausalLM(LlamaConfig(**sizes, rope_parameters=scaled))
    ours = SharedContextLM(other, tiny.tokenizer())
    assert not ours.shares
    assert "every choice is computed on its own" in caplog.text
    requests = [("a context of more than eight", choice) for choice in (" one", " another")]
    stock = HFLM(pretrained=other, tokenizer=tiny.tokenizer(), batch_size=1)
    wanted, found = (lm.loglikelihood(instances(requests), disable_tqdm=True) for lm in (stock, ours))
    assert [a for a, _ in found] == pytest.approx([a for a, _ in wanted], abs=1e-4)


def test_an_adapter_is_evaluated(model_folder: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from hfsd.lm import SharedContextLM

    base = AutoModelForCausalLM.from_pretrained(model_folder)
    plain = SharedContextLM(base, tiny.tokenizer()).loglikelihood(instances(REQUESTS[:5]))
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    lm = SharedContextLM(adapted, tiny.tokenizer())
    assert lm.shares
    changed = lm.loglikelihood(instances(REQUESTS[:5]))
    with torch.no_grad(), adapted.disable_adapter():
        off = SharedContextLM(adapted, tiny.tokenizer()).loglikelihood(instances(REQUESTS[:5]))
    assert [a for a, _ in off] == pytest.approx([a for a, _ in plain], abs=1e-5)
    assert max(abs(a - b) for (a, _), (b, _) in zip(changed, plain, strict=True)) > 1e-3


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
        assert raw["n-samples"]["effective"] == row.n and raw["task_hash"] and raw["chat_template"] is True
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

    manager = TaskManager(include_path=evaluate.PACKAGED, include_defaults=False)
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


def test_a_finished_task_is_not_run_again(
    scored: tuple[list[EvalRow], Path], model: Any, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = scored
    monkeypatch.setattr(evaluate, "_backend", lambda *_: pytest.fail("evaluated again"))
    assert run(model, docs, out) == rows


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
    recipe = Evaluate(tasks=("demo_bpb", "demo_rank"), limit=2)
    rows = evaluate.run(model, tokenizer, ORIGINAL, recipe, docs, tmp_path)
    assert [(r.task, r.n) for r in rows] == [("demo_bpb", 2), ("demo_rank", 2)]
    assert json.loads((tmp_path / "demo_bpb.json").read_text())["lm_eval"]["chat_template"] is False


def test_a_group_with_an_aggregate(
    scored: tuple[list[EvalRow], Path], model: Any, docs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As MMLU: parts finished one by one, one row for the whole, weighted by size."""
    from lm_eval.tasks import TaskManager

    for name, task, count in (("left", "demo_rank", 4), ("right", "demo_rank", 3)):
        lines = (docs / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        config = (evaluate.PACKAGED / f"{task}.yaml").read_text(encoding="utf-8")
        moved = config.replace(f"{task}.jsonl", str(tmp_path / f"{name}.jsonl")).replace(
            f"task: {task}", f"task: {name}"
        )
        (tmp_path / f"{name}.yaml").write_text(moved, encoding="utf-8")
    (tmp_path / "both.yaml").write_text(
        "group: both\ntask: [left, right]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
        "metadata: {version: 3}\n"
    )
    manager = TaskManager(include_path=tmp_path, include_defaults=False)
    monkeypatch.setattr(evaluate, "_manager", lambda packaged=False: manager)
    out = tmp_path / "out"
    (row,) = run(model, docs, out, ("both",))
    left, right = (evaluate._read(out, name)[0] for name in ("left", "right"))
    assert (row.task, row.version, row.n, row.chance) == ("both", "3", 7, 0.25)
    assert row.value == pytest.approx((4 * left.value + 3 * right.value) / 7)
    assert [json.loads(line)["task"] for line in (out / row.doc_file).open()] == ["left"] * 4 + ["right"] * 3
    monkeypatch.setattr(evaluate, "_backend", lambda *_: pytest.fail("evaluated again"))
    assert run(model, docs, out, ("both",)) == [row]
    (out / "both.json").unlink()
    assert run(model, docs, out, ("both",)) == [row]


def test_unknown_tasks_name_the_nearest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, docs: Path) -> None:
    known = type("Manager", (), {"all_tasks": ["arc_challenge", "arc_easy", "piqa"], "all_groups": []})
    monkeypatch.setattr(evaluate, "_manager", known)
    assert evaluate.check_tasks(["demo", "openllm", "demo_rank", "mmlu", "piqa", "arc_easy"]) == []
    faults = evaluate.check_tasks(["demo_rnak", "arc_eazy", "zzzz"])
    assert [f.split(";")[0] for f in faults] == [
        "no suite, task or group 'demo_rnak' (nearest: demo_rank, demo_match, demo)",
        "no suite, task or group 'arc_eazy' (nearest: arc_easy)",
        "no suite, task or group 'zzzz'",
    ]
    with pytest.raises(BadRequest, match=r"evaluate\.tasks: no suite, task or group 'demo_rnak'"):
        run(None, docs, tmp_path, ("demo_rnak",))


def test_packaged_names_need_no_lm_eval() -> None:
    code = (
        "import sys; from hfsd import evaluate;"
        "assert evaluate.check_tasks(['demo', 'openllm', 'demo_bpb', 'arc_easy']) == [];"
        "assert evaluate.suite('demo')[0] == 'demo_match' and evaluate.suite('piqa') == ('piqa',);"
        "print([m for m in ('torch', 'transformers', 'datasets', 'lm_eval') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


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

    monkeypatch.setattr(SharedContextLM, "_forward", lambda *_: 1 / 0)
    monkeypatch.setattr(SharedContextLM, "_why_not_shared", lambda _: "")
    with pytest.raises(HfsdError, match=r"demo_rank on original failed: ZeroDivisionError: division by zero") as caught:
        run(model, docs, tmp_path, ("demo_rank",))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
