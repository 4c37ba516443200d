"""Our backend of lm-eval against its own: log-likelihoods, greedy texts, what is computed, several processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from hfsd import prefixes
from tests import architectures, tiny

# Architectures without a plain cache of keys and values: every text is read whole.
WHOLE = {"Qwen3-Next", "GraniteMoeHybrid", "LFM2"}
# Those with windows too: a mask of ours would say nothing of them, so that no continuations share a row.
UNPACKED = {*WHOLE, "Mistral, sliding window", "Qwen2, sliding layers", "Gemma2", "Gemma3, text", "Gemma3, multimodal"}
UNPACKED |= {"OLMo3", "gpt-oss", "Llama4, text", "Cohere2"}


@pytest.fixture(scope="module")
def model(model_folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder)


def instances(requests: list[Any], kind: str = "loglikelihood") -> list[Any]:
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, args, i) for i, args in enumerate(requests)]


def both(model: Any, batch_tokens: int = 2048, **options: Any) -> tuple[Any, Any]:
    """lm-eval's backend, text by text, and ours."""
    from lm_eval.models.huggingface import HFLM

    from hfsd.lm import SharedContextLM

    tokenizer = options.pop("tokenizer", None) or tiny.tokenizer()
    # with its cache of logits, lm-eval 0.4.13 mis-scores one text that is split at two places (REQUESTS has one)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, logits_cache=False, **options)
    return stock, SharedContextLM(model, tokenizer, batch_tokens, **options)


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Tokens that the model reads in each pass, padding included."""
    read: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, out: read.append(args[0].numel()))
    yield read
    hook.remove()


def assert_equal(found: list[Any], wanted: list[Any]) -> None:
    assert [a for a, _ in found] == pytest.approx([a for a, _ in wanted], abs=1e-4, rel=2e-7)  # or one step of float32
    assert [greedy for _, greedy in found] == [greedy for _, greedy in wanted]


REQUESTS = [
    *(("Two and two are", choice) for choice in (" four", " five", " fourteen", " 4", " four")),
    *(("One letter:", choice) for choice in ("A", "B", "C", "D")),  # choices of one token
    *(("A prefix of another:", choice) for choice in (" long", " longer and longer", " l")),
    *((f"Shots, the same for all of them.\n\nQuestion {q}:", f" {c}nswer") for q in range(3) for c in "Aa"),
    *((f"The trophy did not fit because the {what}", " was too large") for what in ("trophy", "suitcase")),
    ("No relatives,", " one choice."),
    ("The same text", " as a longer context's"),
    ("The same text as", " a longer context's"),
    ("", "no context at all"),
    ("trailing space ", "moves to the choice"),
    *(("x" * 1500, choice) for choice in ("too long", "too long to read")),  # past the model's 1024 positions
]


@pytest.mark.parametrize("batch_tokens", [2048, 16])
def test_log_likelihoods_equal_lm_evals_own(model: Any, batch_tokens: int) -> None:
    stock, ours = both(model, batch_tokens)
    assert ours.shares
    assert_equal(ours.loglikelihood(instances(REQUESTS)), stock.loglikelihood(instances(REQUESTS), disable_tqdm=True))
    texts = instances([("some text to roll over",), ("another one",), ("y" * 1200,)], "loglikelihood_rolling")
    wanted = stock.loglikelihood_rolling(texts, disable_tqdm=True)
    assert ours.loglikelihood_rolling(texts) == pytest.approx(wanted, abs=1e-3)  # sums over a thousand tokens


def test_a_large_vocabulary_is_scored_as_lm_eval_does() -> None:
    """In float32, how a softmax over 50,000 logits is summed shows in the fifth digit of every token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50_000, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    wide = LlamaForCausalLM(config)
    with torch.no_grad():
        wide.lm_head.weight.mul_(100)  # logits as spread as a trained model's
    requests = [("context", choice * 60) for choice in (" one", " two")]
    stock, ours = both(wide)
    assert_equal(ours.loglikelihood(instances(requests)), stock.loglikelihood(instances(requests), disable_tqdm=True))


def test_a_greedy_continuation_is_seen(model: Any) -> None:
    """A text is told to be what the model would write, also when it is a fork of another."""
    import torch

    ids = tiny.tokenizer()("Greedy continuations:", return_tensors="pt").input_ids
    with torch.no_grad():
        written = model.generate(ids, do_sample=False, max_new_tokens=6, min_new_tokens=6)[0, ids.shape[1] :]
    tails = (written.tolist(), [5] * 40, [5] * 39 + [6], written.tolist()[:3] + [5])
    found = both(model)[1]._loglikelihood_tokens([(None, ids[0].tolist(), tail) for tail in tails])
    assert [greedy for _, greedy in found] == [True, False, False, False]


def test_what_is_shared_is_computed_once(model: Any) -> None:
    """Choices share their context, and questions the shots before them."""
    ours = both(model)[1]
    with counted(model) as read:
        ours.loglikelihood(instances([("c" * 400, f" same{i}") for i in range(4)]))
        assert sum(read) <= 400 + 4 * len(" same0")
        read.clear()
        # four letters are predicted by one position; the questions part at their first letter
        asked = [("shots " * 50 + f"{chr(97 + q)} question" * 3 + "\nAnswer:", c) for q in range(8) for c in "ABCD"]
        ours.loglikelihood(instances(asked))
        assert sum(read) <= 6 * 50 + 8 * (3 * len("a question") + len("\nAnswer:"))


def test_a_batch_keeps_what_the_budget_allows(model: Any) -> None:
    """Behind long shots each row brings their keys and values along: 64 questions are not one batch."""
    ours = both(model, 256)[1]
    rows: list[int] = []
    plain = ours._forward

    def watched(inputs: Any, keep: int, cache: Any = None, packs: Any = None) -> Any:
        logits, kept = plain(inputs, keep, cache, packs)
        if kept is not None:
            rows.append(kept.layers[0].keys.shape[0] * kept.layers[0].keys.shape[2])
        return logits, kept

    ours._forward = watched
    asked = [("shots " * 40 + f"{chr(97 + q // 8)}{chr(97 + q % 8)}:", c) for q in range(64) for c in ("yes", "no")]
    ours.loglikelihood(instances(asked))
    assert max(rows) <= 4 * 256 and len(rows) > 64 * 240 // (4 * 256)


@pytest.fixture(scope="module", params=architectures.TABLE, ids=lambda row: row.label)
def architecture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM

    folder = architectures.build(request.param, tmp_path_factory.mktemp("built") / "model")
    return request.param.label, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def questions(length: int) -> list[tuple[None, list[int], list[int]]]:
    """Two questions behind the same shots, with contexts of `length` tokens and a few more, and relatives of them."""
    draw = random.Random(length)

    def some(n: int) -> list[int]:
        return [draw.randrange(3, 60) for _ in range(n)]

    shots, requests = some(length // 2), []
    for q in range(2):
        context, stem = shots + some(length - length // 2 + q), some(2)
        tails = [*(stem + some(1 + c) for c in range(3)), some(1), some(1)]
        requests += [(None, context, tail) for tail in tails] + [(None, context[:-4], some(5))]
    return [*requests, (None, some(3), some(4))]


def test_every_architecture_is_scored_as_by_lm_eval(
    architecture: tuple[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below, around and above the tiny models' windows (8) and chunks (16); shared wherever there is a plain cache."""
    label, model = architecture
    stock, ours = both(model, 256)
    assert ours.shares == (label not in WHOLE) and ours._packs == (label not in UNPACKED)
    monkeypatch.setattr(prefixes, "PASS", 0)  # so that no padding is worth a pass less
    for length in (5, 13, 40):
        asked = questions(length)
        with counted(model) as read:
            found = ours._loglikelihood_tokens(asked)
        whole = sum(map(len, {tuple(context + tail[:-1]) for _, context, tail in asked}))
        # what is shared is as long as the context, and not worth it below 8 tokens
        part = {5: 1.1, 13: 0.8, 40: 0.4}[length]
        assert sum(read) < part * whole if ours.shares else sum(read) >= whole
        assert_equal(found, stock._loglikelihood_tokens(asked, disable_tqdm=True))


PROMPTS = ["#%'", "0123456789012345", "(&$)(&$)(&$)01", "98765432"]  # bytes below 64, which are these models' tokens
WRITES = {"Mistral, sliding window", "Qwen3-Next", "Gemma2", "LFM2", "Llama4, text", "OPT"}


@pytest.mark.parametrize(
    "architecture",
    [row for row in architectures.TABLE if row.label in WRITES],
    indirect=True,
    ids=lambda row: row.label,
)
def test_greedy_texts_are_lm_evals(architecture: tuple[str, Any]) -> None:
    """Rows leave caches of every kind: windows that have rolled over, recurrent state, convolutions."""
    _, model = architecture
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"pad_token": "!"})
    stock, ours = both(model, 256, tokenizer=tokenizer)
    free = instances([(p, {"until": [], "max_gen_toks": 16}) for p in PROMPTS], "generate_until")
    texts = stock.generate_until(free, disable_tqdm=True)
    stops = [max(texts, key=len)[4:6], max(texts[:2], key=len)[9]]
    asked = instances([(p, {"until": stops, "max_gen_toks": 16}) for p in PROMPTS], "generate_until")
    wanted = stock.generate_until(asked, disable_tqdm=True)
    assert len(set(map(len, wanted))) > 1  # they end at different places
    assert ours.generate_until(free) == texts and ours.generate_until(asked) == wanted


def words(texts: list[str]) -> Callable[..., list[Any]]:
    return lambda **settings: instances([(text, settings) for text in texts], "generate_until")


def test_finished_rows_are_not_computed(model: Any) -> None:
    """Every row is computed to its own stop string, and no row to the limit with the others."""
    stock, ours = both(model)
    asked = words([f"{chr(65 + i)} prompt that is as long" for i in range(6)])
    free = stock.generate_until(asked(until=[], max_gen_toks=40), disable_tqdm=True)
    stop = min((c for text in free for c in set(text)), key=lambda c: abs(sum(c in text for text in free) - 4))
    requests = asked(until=[stop], max_gen_toks=40)
    wanted = stock.generate_until(requests, disable_tqdm=True)
    with counted(model) as alone:
        stock.generate_until(requests, disable_tqdm=True)
    with counted(model) as read:
        assert ours.generate_until(requests) == wanted
    assert any(len(text) < 30 for text in wanted)
    assert sum(read) == sum(alone)  # one batch computes what the rows do one by one
    assert len(read) < len(alone) / 2


def test_generation_fills_the_budget(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfsd import generation

    rows: list[int] = []
    plain = generation.greedy

    def watched(model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        rows.append(len(prompts))
        return plain(model, tokenizer, prompts, *rest)

    monkeypatch.setattr(generation, "greedy", watched)
    _, ours = both(model, 64)
    made = ours.generate_until(words(["p" * 24] * 10 + ["q" * 120])(until=["\n"], max_gen_toks=8))
    assert sorted(rows) == [1, 2, 8] and len(made) == 11  # 4 x 64 tokens: 8 rows of 32; and the long one


def test_a_context_that_leaves_no_room_is_cut_as_lm_eval_does(model: Any) -> None:
    stock, ours = both(model)
    requests = words(["x" * 700 + "y" * 700, "short", "z" * 1024])(until=["\n\n"], max_gen_toks=12)
    assert ours.generate_until(requests) == stock.generate_until(requests, disable_tqdm=True)


def test_sampling_is_left_to_the_library(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hfsd import generation

    monkeypatch.setattr(generation, "greedy", lambda *_: pytest.fail("not asked for"))
    requests = words(["a prompt"])(until=["\n"], max_gen_toks=12, do_sample=True, temperature=1.0)
    texts = []
    for lm in both(model):
        torch.manual_seed(0)
        texts.append(lm.generate_until(requests, disable_tqdm=True))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    "asks",
    [
        {"max_new_tokens": 3},
        {"num_beams": 3},
        {"repetition_penalty": 3.0},
        {"no_repeat_ngram_size": 1, "suppress_tokens": [32, 101]},
    ],
    ids=lambda asks: next(iter(asks)),
)
def test_a_checkpoints_generation_config_does_not_enter_a_text(model: Any, asks: dict[str, Any]) -> None:
    import torch
    from transformers import GenerationConfig

    ours = both(model)[1]
    greedy = words(["a prompt", "and another prompt"])(until=["\n"], max_gen_toks=12)
    sampled = words(["a prompt"])(until=["\n"], max_gen_toks=12, do_sample=True, temperature=1.0)

    def written() -> list[str]:
        torch.manual_seed(0)
        return ours.generate_until(greedy) + ours.generate_until(sampled)

    wanted, held = written(), model.generation_config
    asking = model.generation_config = GenerationConfig(**{**held.to_dict(), **asks})
    try:
        assert written() == wanted and model.generation_config is asking
    finally:
        model.generation_config = held


def test_windows_of_rolling_texts_are_told_as_they_are_read(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from hfsd import lm

    told: list[tuple[int, int]] = []  # the total, and the passes until then

    @contextmanager
    def watched(stage: str, total: int, unit: str) -> Iterator[Any]:
        yield lambda n=1, total=None: told.append((total, len(read)))

    monkeypatch.setattr(lm, "track", watched)
    texts = instances([("one text",), ("another text",), ("z" * 1500,)], "loglikelihood_rolling")
    with counted(model) as read:
        both(model, 16)[1].loglikelihood_rolling(texts)
    assert [total for total, _ in told] == [4] * 4  # the long one has two
    assert told[0][1] < len(read)


def test_a_model_that_processes_share_is_refused() -> None:
    from hfsd.lm import SharedContextLM

    with pytest.raises(ValueError, match="tp_plan: the processes each take documents"):
        SharedContextLM("org/model", tp_plan="auto")


def test_positions_that_depend_on_the_length_take_lm_evals_path(caplog: pytest.LogCaptureFixture) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    scaled = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = LlamaConfig(**architectures.BASE | {"vocab_size": tiny.VOCABULARY}, rope_parameters=scaled)
    stock, ours = both(LlamaForCausalLM(config), max_length=512)
    assert not ours.shares
    assert "every text is computed on its own" in caplog.text
    requests = instances([("a context " * n, choice) for n in (5, 20) for choice in (" one", " another")])
    assert_equal(ours.loglikelihood(requests), stock.loglikelihood(requests, disable_tqdm=True))


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
    assert_equal(off, plain)
    assert max(abs(a - b) for (a, _), (b, _) in zip(changed, plain, strict=True)) > 1e-3
    written = words(["an adapter's text"])(until=["\n"], max_gen_toks=8)
    assert lm.generate_until(written) == both(adapted)[0].generate_until(written, disable_tqdm=True)


TASKS = {
    "choose": "output_type: multiple_choice\ndoc_to_choice: '{{choices}}'\ndoc_to_target: gold\n"
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n",
    "roll": "output_type: loglikelihood_rolling\ndoc_to_target: '{{question}}'\n"
    "metric_list: [{metric: byte_perplexity}]\n",
    "write": "output_type: generate_until\ndoc_to_target: '{{choices[0]}}'\n"
    "generation_kwargs: {until: [' '], max_gen_toks: 12}\nmetric_list: [{metric: exact_match}]\n",
}


def task_files(folder: Path) -> Path:
    """Three tasks of seven local documents: choices, rolling log-likelihood, generation."""
    docs = [
        {"question": f"What is {i} times {i}?", "choices": [f" {i * i}", f" {i}", " none"], "gold": i % 3}
        for i in range(7)
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(d) + "\n" for d in docs))
    for name, rest in TASKS.items():
        text = "" if name == "roll" else "{{question}}"
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'docs.jsonl'}}}}}\n"
            f"test_split: test\nnum_fewshot: 0\ndoc_to_text: '{text}'\n{rest}"
        )
    return folder


def test_lm_evals_own_way_to_name_a_model(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import evaluator, simple_evaluate
    from lm_eval.tasks import TaskManager

    import hfsd.lm  # noqa: F401  (registers the model type)

    monkeypatch.setattr(evaluator, "add_env_info", lambda _: None)  # lists all installed packages, for seconds
    manager = TaskManager(include_path=task_files(tmp_path), include_defaults=False)
    settings: dict[str, Any] = {"tasks": list(TASKS), "task_manager": manager, "bootstrap_iters": 0, "device": "cpu"}
    ours = simple_evaluate(model="hfsd", model_args={"pretrained": str(model_folder), "batch_tokens": 64}, **settings)
    named = f"pretrained={model_folder},batch_tokens=64,dtype=float32"
    same = simple_evaluate(model="hfsd", model_args=named, batch_size=2, **settings)
    stock = simple_evaluate(model="hf", model_args={"pretrained": str(model_folder)}, **settings)
    assert ours and same and stock and ours["config"]["model"] == "hfsd"
    for name in TASKS:
        assert same["results"][name] == ours["results"][name]
        numbers = {k: v for k, v in ours["results"][name].items() if isinstance(v, float)}
        assert numbers and numbers == pytest.approx({k: stock["results"][name][k] for k in numbers}, rel=1e-5)


WORKER = """
import json, sys
from hfsd import processes
from tests import test_lm
model, tasks, out = sys.argv[1:]
found = test_lm.evaluated(model, tasks)
assert processes.count() == 2 and (found is None) == (processes.rank() == 1)
if found:
    json.dump(found, open(out, "w"))
processes.leave()
"""


def evaluated(model_folder: Path, tasks: Path) -> Any:
    """Results, and the responses to each document, on the first process; None on the others."""
    from lm_eval import evaluate
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM

    from hfsd.lm import SharedContextLM

    lm = SharedContextLM(AutoModelForCausalLM.from_pretrained(model_folder), tiny.tokenizer())
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found: Any = evaluate(lm, manager.load(list(TASKS)), bootstrap_iters=0)
    if found is None:
        return None
    samples = {name: sorted(found["samples"][name], key=lambda s: s["doc_id"]) for name in TASKS}
    responses = {name: [[s["doc_hash"], s["filtered_resps"]] for s in samples[name]] for name in TASKS}
    return json.loads(json.dumps([found["results"], responses, found["n-samples"]]))


def test_two_processes_score_as_one_does(model_folder: Path, tmp_path: Path) -> None:
    """Seven documents: four on one process, three on the other."""
    (tmp_path / "tasks").mkdir()
    folder = task_files(tmp_path / "tasks")
    (tmp_path / "worker.py").write_text(WORKER)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "worker.py"), str(model_folder), str(folder), str(tmp_path / "found.json")]
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    results, responses, counts = json.loads((tmp_path / "found.json").read_text())
    alone, own_responses, own_counts = evaluated(model_folder, folder)
    assert counts == own_counts and counts["choose"]["effective"] == 7
    for name in TASKS:
        assert [d for d, _ in responses[name]] == [d for d, _ in own_responses[name]] and len(responses[name]) == 7
        flat, own_flat = numbers(responses[name]), numbers(own_responses[name])
        assert flat == [pytest.approx(x, abs=1e-5) if isinstance(x, float) else x for x in own_flat]
        exact = {k: v for k, v in alone[name].items() if k.startswith(("acc", "exact_match"))}
        assert exact or name == "roll"
        assert {k: results[name][k] for k in exact} == exact
        for key, value in alone[name].items():
            assert results[name][key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)


def numbers(responses: Any) -> Any:
    """What nested lists hold."""
    if isinstance(responses, list):
        return [x for part in responses for x in (numbers(part) if isinstance(part, list) else [part])]
    return responses
