"""Tiny models and a byte-level tokenizer, made in the test: what every stage is tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 256 + len(SPECIAL)


def tokenizer() -> Any:
    """A tokenizer whose tokens are bytes, with ChatML's special tokens and template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(SPECIAL)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHATML
    return fast


def llama(folder: Path, n_layers: int = 6, seed: int = 0, tied: bool = True) -> Path:
    """A random Llama with its tokenizer, saved to a folder as any checkpoint is."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=257,
        eos_token_id=258,
        pad_token_id=256,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # the default start is so small that every block is nearly the identity
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def llama8b(**changes: Any) -> Any:
    """The config of Llama-3.1-8B."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
        dtype="bfloat16",
        **changes,
    )


def bare_llama8b(root: Path) -> Path:
    """A folder with that config and nothing else."""
    llama8b().save_pretrained(root / "llama-3.1-8b")
    return root / "llama-3.1-8b"


def problems(count: int = 40) -> list[dict[str, str]]:
    """Word problems of several templates with worked answers, in GSM8K's shape."""
    names = ("Ada", "Ben", "Cleo", "Dan", "Eve")
    things = ("pens", "cups", "eggs", "nuts", "maps", "keys", "hats", "pins")
    rows = []
    for i in range(count):
        a, b, name, thing = 2 + i % 7, 3 + i % 5, names[i % 5], things[(i // 5) % 8]
        rows.append(
            {
                "question": f"{name} has {a} {thing} and buys {b} more, number {i}. How many {thing}?",
                "answer": f"{name} starts with {a} {thing}.\nThen {a} + {b} = {a + b} {thing}.\n#### {a + b}",
            }
        )
    return rows


def example(i: int) -> Any:
    """One of `problems` as the package's own record."""
    from hfsd.records import Example

    row = problems(i + 1)[i]
    return Example(f"r{i}", row["question"], row["answer"])


def data_file(path: Path, count: int = 40) -> Path:
    """`problems` as a .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in problems(count)), encoding="utf-8")
    return path


def recipe(model: Path, **changes: Any) -> Any:
    """A whole recipe for a tiny model, seconds to run. `changes` are dotted fields with `__` for the dot."""
    from hfsd import recipes

    data = {
        "name": "tiny",
        "model": {"path": str(model), "license": "apache-2.0"},
        "data": {"source": "gym:gsm_symbolic", "pool": 600, "rows": 12, "max_chars": 480},
        "scan": {"rows": 6, "verify_rows": 3, "max_length": 512, "candidates": 2},
        "prune": {"blocks": 2},
        "rewrite": {"task": "math", "mode": "reference", "max_new_tokens": 12, "batch_rows": 4},
        "train": {"lora": {"r": 4}, "sft": {"per_device_train_batch_size": 4, "save_steps": 1}},
        "evaluate": {"tasks": ["demo"], "limit": 4},
        "compare": {"prompts": 2, "max_new_tokens": 8},
    }
    sets = [f"{name.replace('__', '.')}={json.dumps(value)}" for name, value in changes.items()]
    return recipes.validate(data, "tiny", sets)
