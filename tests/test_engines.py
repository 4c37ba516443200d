"""Engines in this process: batches equal single rows, whatever fits in memory, and what the model cannot read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hfsd import chat, engines, models, vllm_engine
from hfsd.blocks_cut import Model
from hfsd.engines import Batch, Request, Sampling
from hfsd.errors import HfsdError


def test_transformers_batches_equal_single_rows(model_folder: Path) -> None:
    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    engine = engines.Transformers(model, tokenizer)
    asked = [Request(f"r{i}", chat.single_turn("word " * (i + 1))) for i in range(3)]
    together = engine.generate(asked, Sampling(10), seed=0)
    alone = [engine.generate([r], Sampling(10), seed=0)[0] for r in asked]
    assert together == alone and [c.id for c in together] == ["r0", "r1", "r2"]
    assert all(c.finish == "stop" or c.n_tokens == 10 for c in together)
    one, two = (engine.generate(asked, Sampling(10, temperature=1.0), seed=s) for s in (1, 1))
    assert one == two != engine.generate(asked, Sampling(10, temperature=1.0), seed=2)


def test_answers_follow_the_model_and_not_its_generation_config(model_folder: Path) -> None:
    import torch

    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    engine, asked = engines.Transformers(model, tokenizer), [Request("r", chat.single_turn("word"))]
    hot = Sampling(10, temperature=1.0)
    ((prompt, free),), warm = engine.tokens(asked, Sampling(10), 0), engine.tokens(asked, hot, 1)
    held = model.generation_config
    held.repetition_penalty, held.suppress_tokens, held.top_k, held.min_p = 3.0, free[:2], 2, 0.9
    assert engine.tokens(asked, Sampling(10), 0) == [(prompt, free)] and engine.tokens(asked, hot, 1) == warm
    assert model.generation_config is held
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + free])).logits[0, len(prompt) - 1 : -1]
    assert free == logits.argmax(-1).tolist()
    held.eos_token_id = free[1]  # where a turn ends, the checkpoint does say
    assert engine.tokens(asked, Sampling(10), 0) == [(prompt, free[: free.index(free[1]) + 1])]


def test_an_adapter_follows_no_generation_config_either(model_folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"]))
    engine, asked = engines.Transformers(tuned, tokenizer), [Request("r", chat.single_turn("word"))]
    free, held = engine.tokens(asked, Sampling(10), 0), base.generation_config
    held.repetition_penalty = 3.0
    assert engine.tokens(asked, Sampling(10), 0) == free
    assert base.generation_config is held is tuned.generation_config


def test_out_of_memory_halves_the_batch_and_goes_on(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    asked = [Request(f"r{i}", chat.single_turn("word " * (9 - i))) for i in range(8)]
    expected = engines.Transformers(model, tokenizer).generate(asked, Sampling(6), seed=0)
    real, sizes = type(model).generate, []

    def small(self, **options):
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(self, **options)

    monkeypatch.setattr(type(model), "generate", small)
    assert engines.Transformers(model, tokenizer).generate(asked, Sampling(6), seed=0) == expected
    assert sizes[:3] == [8, 4, 2] and set(sizes[3:]) <= {1, 2}
    monkeypatch.setattr(
        type(model), "generate", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory."))
    )
    with pytest.raises(HfsdError, match="one row of .* tokens does not fit in memory; lower rewrite.max_new_tokens"):
        engines.Transformers(model, tokenizer).generate(asked, Sampling(6), seed=0)


def test_a_budget_of_tokens_changes_nothing_but_the_batches(model_folder: Path) -> None:
    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    asked = [Request(f"r{i}", chat.single_turn("word " * (i + 1))) for i in range(5)]
    wide, narrow = (engines.Transformers(model, tokenizer, b).generate(asked, Sampling(6), 0) for b in (10**6, 150))
    assert wide == narrow


def test_likelihoods_equal_a_plain_computation(model_folder: Path) -> None:
    import torch

    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    talks = [chat.single_turn("why " * (i + 1)) for i in range(4)]
    answers = ["because", "", "so it is", "x"]
    found = engines.Transformers(model, tokenizer, 200).nats(list(zip(talks, answers, strict=True)))
    for talk, answer, nats in zip(talks, answers, found, strict=True):
        head, tail = chat.answer_ids(tokenizer, talk, answer)
        if not tail:
            assert nats is None
            continue
        with torch.inference_mode():
            logs = model(torch.tensor([head + tail])).logits[0].log_softmax(-1)
        plain = -sum(logs[len(head) + i - 1, t].item() for i, t in enumerate(tail)) / len(tail)
        assert nats == pytest.approx(plain, rel=1e-5)


def test_likelihoods_make_only_the_logits_that_they_read(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    talks = [(chat.single_turn("why " * (9 + 9 * i)), "because" * (i + 1)) for i in range(3)]
    engine, made = engines.Transformers(model, tokenizer), []
    few = engine.nats(talks)
    real = type(model).forward

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        out = real(self, *args, **options)
        made.append(out.logits.shape[1])
        return out

    monkeypatch.setattr(type(model), "forward", forward)  # whose signature names no logits_to_keep
    whole = engines.Transformers(model, tokenizer)
    assert not whole._keeps_logits and engine._keeps_logits
    assert whole.nats(talks) == pytest.approx(few, rel=1e-6) and engine.nats(talks) == few
    pairs = [chat.answer_ids(tokenizer, *talk) for talk in talks]
    longest = max(len(head + tail) for head, tail in pairs)
    assert made == [longest, longest - min(len(head) for head, _ in pairs) + 1]


def test_scoring_that_runs_out_of_memory_leaves_generation_its_budget(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    engine = engines.Transformers(model, tokenizer)
    talks = [(chat.single_turn("why"), "because")] * 4
    expected, budget, real, sizes = engine.nats(talks), engine.budgets["generate"], type(model).forward, []

    def small(self: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(options["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, *args, **options)

    monkeypatch.setattr(type(model), "forward", small)
    assert engine.nats(talks) == pytest.approx(expected) and sizes == [4, 2, 2]
    assert engine.budgets["generate"] == budget > engine.budgets["score"]


def test_sampling_after_an_out_of_memory_is_repeatable(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    asked = [Request(f"r{i}", chat.single_turn("word")) for i in range(8)]
    hot = Sampling(6, temperature=1.0)
    engine = engines.Transformers(model, tokenizer)
    size = len(tokenizer(chat.render(tokenizer, asked[0].messages))["input_ids"]) + 6
    expected = engines.Transformers(model, tokenizer, batch_tokens=4 * size).generate(asked, hot, seed=3)
    real = type(model).generate

    def small(self: Any, **options: Any) -> Any:
        if len(options["input_ids"]) > 4:
            torch.rand(100)  # what was drawn until then
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, **options)

    monkeypatch.setattr(type(model), "generate", small)
    assert engine.generate(asked, hot, seed=3) == expected
    assert len({c.text for c in expected}) > 4  # the halves of a batch do not draw the same numbers


def test_a_prompt_that_fills_the_models_positions_fails_alone(model_folder: Path) -> None:
    model, tokenizer = models.load(model_folder), models.load_tokenizer(model_folder)
    engine = engines.Transformers(model, tokenizer)
    assert engine.limit == 1024
    empty = len(tokenizer(chat.render(tokenizer, chat.single_turn("")))["input_ids"])
    lengths = {"fits": 10, "just": 1024 - empty - 3, "none": 1024 - empty, "over": 2000}
    asked = [Request(name, chat.single_turn("x" * n)) for name, n in lengths.items()]
    made = {c.id: c for c in engine.generate(asked, Sampling(6), seed=0)}
    assert made["fits"] == engine.generate(asked[:1], Sampling(6), seed=0)[0]
    assert made["just"] == engine.generate(asked[1:2], Sampling(3), seed=0)[0] and made["just"].n_tokens <= 3
    assert made["none"].finish == "failed: 1024 tokens of prompt leave no room in the 1024 that the model reads"
    assert made["over"].finish.startswith("failed: ") and (made["over"].text, made["over"].n_tokens) == ("", 0)
    nats = engine.nats([(r.messages, "yes") for r in asked])
    assert [n is None for n in nats] == [False, False, True, True]


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_position_embeddings": 2048}, 2048),
        ({}, None),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, 2048),
        ({"max_position_embeddings": 2048, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 8192),
        (
            {
                "max_position_embeddings": 8192,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048},
            },
            8192,
        ),
    ],
)
def test_how_many_tokens_a_model_reads(fields: dict[str, Any], limit: int | None) -> None:
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(**fields))
    assert engines.positions(config) == limit  # type: ignore[arg-type]


class Vllm:
    """vLLM's `LLM` as far as it is used: says its prompt's length, and refuses one without room for a token."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.calls = tokenizer, []
        self.llm_engine = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024))

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def generate(self, prompts: list[dict[str, list[int]]], asked: Any, use_tqdm: bool) -> list[Any]:
        ids = [p["prompt_token_ids"] for p in prompts]
        if any(len(i) >= 1024 for i in ids):
            raise ValueError("The decoder prompt is longer than the maximum model length of 1024")
        self.calls.append([a.seed for a in asked] if isinstance(asked, list) else asked)
        return [
            SimpleNamespace(
                outputs=[SimpleNamespace(text=f" {len(i)} ", token_ids=[1, 2], finish_reason="stop")],
                prompt_logprobs=[{t: SimpleNamespace(logprob=-1.5)} for t in i],
            )
            for i in ids
        ]


def test_vllm_gets_several_batches_at_once_and_no_prompt_without_room(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = Vllm(models.load_tokenizer(model_folder))
    fake = SimpleNamespace(LLM=lambda **_: llm, SamplingParams=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    engine = vllm_engine.InProcess(model_folder, 1, Model(path="x"))
    asked = [Request(f"r{i}", chat.single_turn("x" * i)) for i in range(6)]
    asked[4] = Request("r4", chat.single_turn("x" * 1024))
    batches = [Batch(asked[:2], 7), Batch(asked[2:5], 8), Batch(asked[5:], 9)]
    made = dict(engine.stream(iter(batches), Sampling(5)))
    assert llm.calls == [[7, 7, 8, 8, 9]]  # one call; each row with the seed of its batch
    assert [[c.id for c in made[k]] for k in range(3)] == [["r0", "r1"], ["r2", "r3", "r4"], ["r5"]]
    assert made[1][2].finish.startswith("failed: ") and "leave no room in the 1024" in made[1][2].finish
    assert [engine.generate(b.requests, Sampling(5), b.seed) for b in batches] == [made[k] for k in range(3)]
    many = dict(engine.stream((Batch(asked[:1], k) for k in range(vllm_engine.AT_ONCE + 1)), Sampling(5)))
    assert len(many) == vllm_engine.AT_ONCE + 1 and [len(c) for c in llm.calls[-2:]] == [vllm_engine.AT_ONCE, 1]
    assert engine.nats([(asked[4].messages, "yes"), (asked[0].messages, "yes"), (asked[0].messages, "")]) == [
        None,
        pytest.approx(1.5),
        None,
    ]
    assert engine.generate([asked[4]], Sampling(5), 0)[0].finish.startswith("failed: ")
