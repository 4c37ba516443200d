"""Costs from configs alone, against real models, real caches, files on disk, and what a cut records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hfsd import cost, models, prune, surgery
from hfsd.errors import Refusal
from hfsd.records import ModelRef
from tests import architectures, tiny

ROWS = [pytest.param(row, id=row.label) for row in architectures.TABLE]
CUTTABLE = [pytest.param(row, id=row.label) for row in architectures.TABLE if row.refused is None]
LONG, LONGER = 40, 44  # tokens, past every window of the table


def _config(row: architectures.Architecture) -> Any:
    import transformers

    given = ({} if row.plain else architectures.BASE) | row.config
    return getattr(transformers, f"{row.kind}Config")(**given)


def _cache_bytes(model: Any, tokens: int) -> int:
    """Of the cache that a real model leaves after a text, each of its tensors once."""
    import torch

    with torch.inference_mode():
        layers = model(input_ids=torch.arange(tokens)[None, :] % 50 + 3, use_cache=True).past_key_values.layers
    held = 0
    for layer in layers:
        parts = [getattr(layer, "keys", None), getattr(layer, "values", None)]
        for states in (getattr(layer, "conv_states", {}), getattr(layer, "recurrent_states", {})):
            parts += states.values()
        held += sum(t.numel() * t.element_size() for t in parts if t is not None)
    return held


@pytest.mark.parametrize("row", ROWS)
def test_parameters_and_cache_are_those_of_a_real_model(row: architectures.Architecture) -> None:
    import torch
    import transformers

    config = _config(row)
    real = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    found = cost.of_config(config)
    assert found.params == models.count_params(real)
    assert found.kv_note == "" and found.kv_bytes is not None and found.state_bytes is not None
    assert found.kv_bytes * LONG + found.state_bytes == _cache_bytes(real, LONG)
    assert found.kv_bytes * LONGER + found.state_bytes == _cache_bytes(real, LONGER)


@pytest.mark.parametrize("row", CUTTABLE)
def test_a_cut_costs_what_the_cut_model_costs(row: architectures.Architecture) -> None:
    config = _config(row)
    whole, blocks = cost.by_block(config)
    kept = [0, 1, 5]
    assert cost.of_config(config, kept) == whole.less(blocks[i] for i in (2, 3, 4))


@pytest.mark.parametrize("label", ["Llama, untied", "Mixtral", "Gemma3, text", "Qwen3-MoE, mlp_only_layers"])
def test_what_a_cut_records_is_what_was_planned(label: str, tmp_path: Path) -> None:
    row = next(r for r in architectures.TABLE if r.label == label)
    folder = architectures.build(row, tmp_path / "model")
    plan = surgery.plan_removing(6, 2, 5, "test")
    made = prune.run(folder, ModelRef("test", ""), plan, tmp_path / "cut", check="structure")
    before = cost.of_folder(folder)
    after = cost.of_config(models.load_config(folder), plan.kept)
    assert (made.original_params, made.params) == (before.params, after.params)
    assert made.matmul_flop_cut == pytest.approx(1 - after.matmul_flops / before.matmul_flops, abs=1e-6)
    assert cost.of_folder(tmp_path / "cut") == after


def test_the_table_of_the_design() -> None:
    """8.030 B -> 6.722 B without 6 of 32 blocks: 16.30% of the parameters, 17.44% of the matmul FLOPs."""
    whole, blocks = cost.by_block(tiny.llama8b())
    assert whole.params == 8_030_261_248 and blocks[0].params == 218_112_000
    assert whole.checkpoint_bytes == 2 * whole.params
    assert whole.kv_bytes == 2 * 8 * 128 * 32 * 2
    expected = {2: (7.594, 5.43, 5.81), 4: (7.158, 10.86, 11.62), 6: (6.722, 16.30, 17.44), 8: (6.285, 21.73, 23.25)}
    expected[10] = (5.849, 27.16, 29.06)
    for n, (params, param_cut, flop_cut) in expected.items():
        cut = whole.less(blocks[:n])
        assert round(cut.params / 1e9, 3) == params
        assert round(100 * (1 - cut.params / whole.params), 2) == param_cut
        assert round(100 * (1 - cut.matmul_flops / whole.matmul_flops), 2) == flop_cut


def test_of_experts_only_those_that_a_token_goes_through_are_counted() -> None:
    from transformers import MixtralConfig

    def flops(taken: int) -> int:
        made = architectures.BASE | {"num_local_experts": 4, "num_experts_per_tok": taken}
        return cost.of_config(MixtralConfig(**made)).matmul_flops

    expert = 3 * 32 * 48
    assert flops(3) - flops(2) == flops(2) - flops(1) == 2 * 6 * expert


def test_a_folder_needs_no_weights_and_with_them_says_what_the_files_hold(tmp_path: Path, model_folder: Path) -> None:
    config = models.load_config(model_folder)
    config.save_pretrained(tmp_path)
    bare, full = cost.of_folder(tmp_path), cost.of_folder(model_folder)
    assert bare == full
    half = json.loads((tmp_path / "config.json").read_text()) | {"dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(half))
    assert cost.of_folder(tmp_path).checkpoint_bytes == full.checkpoint_bytes // 2
    assert full.kv_bytes is not None and cost.of_folder(tmp_path).kv_bytes == full.kv_bytes // 2
    loaded = cost.of_folder(tmp_path, dtype="float32")  # the cache is the loaded model's, the checkpoint the config's
    assert (loaded.kv_bytes, loaded.dtype) == (full.kv_bytes, "float32")
    assert loaded.checkpoint_bytes == full.checkpoint_bytes // 2


def test_a_class_without_a_cache_says_so(tmp_path: Path) -> None:
    folder = architectures.with_code_of_its_own(tmp_path / "wave", by_index=False)
    found = cost.of_folder(folder, trust_remote_code=True)
    assert found.kv_bytes is None and found.kv_note
    assert found.params == 6 * (32 * 32 + 32) + 2 * 64 * 32


def test_an_unsound_cut_has_no_cost() -> None:
    row = next(r for r in architectures.TABLE if r.refused)
    with pytest.raises(Refusal, match="scale_attn_by_inverse_layer_idx"):
        cost.of_config(_config(row), [0, 2, 3, 4, 5])
