"""Every architecture of the README's table, cut at the first block, in the middle and at the last one.

The self-check itself compares with the untouched original whose removed blocks hand their input on; here the bytes are
compared too, and what cannot be cut soundly is refused.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from hfsd import models, prune, shards, surgery
from hfsd.errors import HfsdError, Refusal
from hfsd.records import Checkpoint, ModelRef, PrunePlan
from tests import architectures
from tests.architectures import CUTS, N_LAYERS, TABLE, Architecture


def _cut(source: Path, out: Path, start: int, stop: int, check: str = "numeric", remote: bool = False) -> Checkpoint:
    plan = surgery.plan_removing(N_LAYERS, start, stop, "test")
    return prune.run(source, ModelRef("m"), plan, out, check, trust_remote_code=remote)


def _bytes(folder: Path) -> dict[str, bytes]:
    return {t.name: t.file.read_bytes()[t.start : t.stop] for t in shards.read(folder)}


def _assert_bytes_travelled(source: Path, cut: Path, plan: PrunePlan) -> None:
    old, new = _bytes(source), _bytes(cut)
    for name, data in new.items():
        parts = name.split(".")
        at = next((i for i, p in enumerate(parts) if p.isdecimal()), None)
        if at is not None and name.startswith(surgery.stack_prefix(old, {}, N_LAYERS)):
            parts[at] = str(plan.kept[int(parts[at])])
        assert old[".".join(parts)] == data
    assert sum(map(len, new.values())) < sum(map(len, old.values()))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.label)
def test_every_architecture_is_cut_at_every_place_or_refused(row: Architecture, tmp_path: Path) -> None:
    source = architectures.build(row, tmp_path / "model")
    for place, (start, stop) in CUTS.items():
        out = tmp_path / place
        if row.refused and place != "last":
            with pytest.raises(Refusal, match=row.refused):
                _cut(source, out, start, stop)
            assert not out.exists()
            continue
        made = _cut(source, out, start, stop)
        assert [(c.level, c.result) for c in made.checks] == [("structure", "passed"), ("numeric", "passed")]
        _assert_bytes_travelled(source, out, made.plan)


def test_the_tested_architectures_are_those_of_the_table(tmp_path: Path) -> None:
    import transformers

    kinds = set()
    for row in TABLE:
        config = getattr(transformers, f"{row.kind}Config")
        kinds.add(config.model_type)
    assert kinds == surgery.TESTED


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        # What makes the self-check fail is refused by name first; without the name, the numeric level finds it.
        ({"scale_attn_by_inverse_layer_idx": True}, "logits of the cut gpt2 are off by .* not sound"),
    ],
)
def test_blocks_that_compute_with_their_index_fail_the_numeric_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict, reason: str
) -> None:
    row = next(r for r in TABLE if r.label == "GPT-2")
    source = architectures.build(row, tmp_path / "model")
    config = json.loads((source / "config.json").read_text()) | change
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(surgery, "BY_INDEX", ())
    with pytest.raises(HfsdError, match=reason):
        _cut(source, tmp_path / "cut", 1, 3)
    assert not (tmp_path / "cut").exists()


DERIVED = ("layer_types", "no_rope_layers", "moe_layers", "mlp_only_layers")  # lists that a class fills in by itself
RULES = ("sliding_window_pattern", "full_attention_interval", "no_rope_layer_interval")
STATED_BY_RULE = (
    Architecture("Gemma2", "Gemma2", {"head_dim": 8, "sliding_window": 4096}),
    Architecture("Gemma3", "Gemma3Text", {"head_dim": 8, "sliding_window": 4096}),
    Architecture("Cohere2", "Cohere2", {"head_dim": 8, "sliding_window": 4096, "sliding_window_pattern": 3}),
    Architecture("SmolLM3", "SmolLM3", {"no_rope_layer_interval": 3}),
    Architecture("OLMo3", "Olmo3", {"sliding_window": 4096}),
    Architecture("gpt-oss", "GptOss", {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}),
    Architecture("Qwen2", "Qwen2", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 3}),
    Architecture(
        "Qwen3-Next",
        "Qwen3Next",
        next(r.config for r in TABLE if r.kind == "Qwen3Next") | {"layer_types": None, "full_attention_interval": 3},
    ),
    Architecture("Llama4", "Llama4Text", next(r.config for r in TABLE if r.kind == "Llama4Text")),
)


@pytest.mark.parametrize("row", STATED_BY_RULE, ids=lambda row: row.label)
def test_patterns_that_the_config_leaves_to_its_class_are_cut_block_by_block(row: Architecture, tmp_path: Path) -> None:
    """As many files on the Hub are: no list, only a rule, and windows longer than any short prompt."""
    source = architectures.build(row, tmp_path / "model")
    stated = json.loads((source / "config.json").read_text())
    left_out = {k: v for k, v in stated.items() if k not in DERIVED}
    left_out |= {k: v for k, v in row.config.items() if k in RULES}  # which save_pretrained drops
    if row.kind == "Llama4Text":
        left_out["no_rope_layers"] = []
    (source / "config.json").write_text(json.dumps(left_out))
    lists = [k for k in DERIVED if isinstance(stated.get(k), list) and len(stated[k]) == N_LAYERS]
    assert lists
    for place, (start, stop) in CUTS.items():
        made = _cut(source, tmp_path / place, start, stop)
        assert [c.result for c in made.checks] == ["passed", "passed"]
        cut = json.loads((tmp_path / place / "config.json").read_text())
        for name in lists:
            assert cut[name] == [stated[name][i] for i in made.plan.kept]


@pytest.mark.parametrize(
    "row", [r for r in STATED_BY_RULE if r.kind in ("Gemma2", "Gemma3Text")], ids=lambda r: r.label
)
def test_the_numeric_check_sees_a_window_that_moved(
    row: Architecture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = architectures.build(row, tmp_path / "model")
    config = {k: v for k, v in json.loads((source / "config.json").read_text()).items() if k not in DERIVED}
    (source / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr(surgery, "described", lambda *_: config)  # as if the lists were not written out
    with pytest.raises(HfsdError, match="logits of the cut .* are off by"):
        _cut(source, tmp_path / "cut", 0, 1)


def test_a_tested_name_with_code_of_its_own_is_not_a_tested_architecture(tmp_path: Path) -> None:
    source = architectures.with_code_of_its_own(tmp_path / "wave", by_index=True)
    config = json.loads((source / "config.json").read_text()) | {"model_type": "llama"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(HfsdError, match="logits of the cut llama are off by"):
        _cut(source, tmp_path / "cut", 1, 3, "structure", remote=True)


def test_a_cadence_in_the_config_is_refused_where_a_cut_would_shift_it(tmp_path: Path) -> None:
    fields = {"num_experts": 4, "decoder_sparse_step": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
    row = Architecture("", "Qwen3Moe", {**fields, "head_dim": 8})
    source = architectures.build(row, tmp_path / "model")
    with pytest.raises(Refusal, match=r"qwen3_moe: one block in 2 differs \(decoder_sparse_step\)"):
        _cut(source, tmp_path / "odd", 1, 2)
    assert _cut(source, tmp_path / "even", 1, 3).checks[1].result == "passed"


def test_blocks_behind_the_stack_are_left_out_of_a_cut_and_kept_in_a_copy(tmp_path: Path) -> None:
    """DeepSeek-V3's checkpoints store the block that predicts further tokens as one more block."""
    from safetensors.numpy import load_file, save_file

    row = next(r for r in TABLE if r.kind == "DeepseekV3")
    source = architectures.build(row, tmp_path / "model")
    tensors = load_file(source / "model.safetensors")
    extra = {n.replace("layers.5.", "layers.6."): t for n, t in tensors.items() if ".layers.5." in n}
    save_file(tensors | extra, source / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    made = _cut(source, tmp_path / "cut", 2, 4, "structure")
    assert made.checks[0].result == "passed"
    assert max(int(n.split(".")[2]) for n in _bytes(tmp_path / "cut") if ".layers." in n) == 3
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize("scheme", [architectures.FP8, architectures.INT8], ids=lambda s: s["quant_method"])
def test_eight_bit_storage_travels_as_it_is(tmp_path: Path, scheme: dict) -> None:
    if scheme is architectures.INT8:
        pytest.importorskip("compressed_tensors", reason="int8 storage is read by the package compressed-tensors")
    source = architectures.quantised(tmp_path / "model", scheme)
    for place, (start, stop) in CUTS.items():
        made = _cut(source, tmp_path / place, start, stop)
        assert [c.result for c in made.checks] == ["passed", "passed"]
        _assert_bytes_travelled(source, tmp_path / place, made.plan)
    config = json.loads((tmp_path / "middle" / "config.json").read_text())["quantization_config"]
    if scheme is architectures.FP8:
        assert config["modules_to_not_convert"] == ["lm_head", "model.layers.1.mlp"]


def test_storage_whose_library_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.quantizers import quantizer_compressed_tensors as library

    source = architectures.quantised(tmp_path / "model", architectures.INT8)
    monkeypatch.setattr(library, "is_compressed_tensors_available", lambda *_: False)
    with pytest.raises(HfsdError, match="pip install compressed-tensors") as caught:
        _cut(source, tmp_path / "cut", 1, 2, "structure")
    assert "\n" not in str(caught.value) and not (tmp_path / "cut").exists()


def test_an_unknown_architecture_runs_its_code_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = architectures.with_code_of_its_own(tmp_path / "wave", by_index=False)
    monkeypatch.delenv("WAVE_RAN")
    with pytest.raises(Refusal, match="brings Python code of its own.*--trust-remote-code"):
        _cut(source, tmp_path / "cut", 1, 3)
    assert not (tmp_path / "cut").exists() and "WAVE_RAN" not in os.environ
    for place, (start, stop) in CUTS.items():
        made = _cut(source, tmp_path / place, start, stop, "structure", remote=True)
        assert [c.result for c in made.checks] == ["passed", "passed"]  # structure alone would not do for it
        _assert_bytes_travelled(source, tmp_path / place, made.plan)
        assert (tmp_path / place / "modeling_wave.py").is_file()


def test_an_unknown_architecture_that_fails_the_check_is_refused(tmp_path: Path) -> None:
    source = architectures.with_code_of_its_own(tmp_path / "wave", by_index=True)
    for check in ("auto", "structure", "numeric"):
        with pytest.raises(HfsdError, match="logits of the cut wave are off by"):
            _cut(source, tmp_path / "cut", 1, 3, check, remote=True)
        assert not (tmp_path / "cut").exists()
    assert _cut(source, tmp_path / "cut", 5, 6, remote=True).checks[1].result == "passed"


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    import transformers

    config = transformers.T5Config(vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=6, num_heads=4)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(Refusal, match="t5 is an encoder-decoder"):
        _cut(tmp_path / "t5", tmp_path / "cut", 1, 2)


def test_what_cannot_be_cut_can_be_copied(tmp_path: Path) -> None:
    source = architectures.build(next(r for r in TABLE if r.refused), tmp_path / "model")
    made = prune.run(
        source, ModelRef("m"), surgery.plan_keeping(N_LAYERS, range(N_LAYERS), "a copy"), tmp_path / "copy"
    )
    assert made.checks[1].result == "passed" and _bytes(source) == _bytes(tmp_path / "copy")
    assert models.depth(tmp_path / "copy") == N_LAYERS


def test_the_readme_lists_the_architectures_of_the_tests() -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    rows = text.split("| architecture (")[1].split("\n\n")[0].splitlines()[2:]
    assert [row.split("|")[1].strip() for row in rows] == [row.label for row in TABLE]
    for line, row in zip(rows, TABLE, strict=True):
        assert ("refused" in line) == bool(row.refused)
        for field in row.config:
            if field in ("layer_types", "no_rope_layers", "mlp_only_layers", "first_k_dense_replace"):
                assert f"`{field}`" in line, f"{row.label}: {field}"
