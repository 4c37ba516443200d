"""Config surgery, names, refusals, and the cut view that shares the original's tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import models, surgery
from hfsd.errors import BadRequest, Refusal
from hfsd.family import Family

kept_of_8 = st.sets(st.integers(0, 7), min_size=1).map(lambda s: tuple(sorted(s)))


@given(kept_of_8)
def test_config_lists_follow_the_blocks(kept: tuple[int, ...]) -> None:
    config = {
        "num_hidden_layers": 8,
        "layer_types": [f"t{i}" for i in range(8)],
        "mlp_only_layers": [1, 5],
        "first_k_dense_replace": 3,
        "eos_token_id": list(range(8)),
        "quantization_config": {"ignore": ["model.layers.2.mlp", "lm_head"]},
    }
    cut = surgery.cut_config(config, kept, 8)
    assert cut["num_hidden_layers"] == len(kept)
    assert cut["layer_types"] == [f"t{i}" for i in kept]
    assert [kept[i] for i in cut["mlp_only_layers"]] == [i for i in (1, 5) if i in kept]
    assert cut["first_k_dense_replace"] == len([i for i in kept if i < 3])
    assert cut["eos_token_id"] == list(range(8)) and config["num_hidden_layers"] == 8
    named = [f"model.layers.{kept.index(2)}.mlp"] if 2 in kept else []
    assert cut["quantization_config"]["ignore"] == [*named, "lm_head"]


@given(kept_of_8, st.integers(0, 7))
def test_tensor_names(kept: tuple[int, ...], block: int) -> None:
    plan = surgery.plan_keeping(8, kept, "")
    new = surgery.cut_name(f"model.layers.{block}.mlp.up_proj.weight", "model.layers", plan)
    assert new == (f"model.layers.{kept.index(block)}.mlp.up_proj.weight" if block in kept else None)
    assert surgery.cut_name("model.norm.weight", "model.layers", plan) == "model.norm.weight"
    behind = surgery.cut_name("model.layers.8.eh_proj.weight", "model.layers", plan)  # predicts further tokens
    assert behind == ("model.layers.8.eh_proj.weight" if len(kept) == 8 else None)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3n", "num_kv_shared_layers": 10}, "reuse the keys and values"),
        ({"model_type": "jamba", "attn_layer_period": 4}, "one block in 4 differs"),
    ],
)
def test_what_cannot_be_cut_soundly_is_refused_by_name(config: dict, reason: str) -> None:
    with pytest.raises(Refusal, match=f"{config['model_type']}.*{reason}"):
        surgery.refuse_unsound(config, (0, 1, 4, 5, 6, 7), 8)


@pytest.mark.parametrize(
    "name",
    [
        r"re:model\.layers\.[0-2]\.mlp",
        r"re:.*\.(3|4)\.mlp.*",
        "transformer.h.3*",
        "model.layers.1*.mlp",
    ],
)
def test_a_pattern_over_blocks_is_refused(name: str) -> None:
    config = {"num_hidden_layers": 4, "quantization_config": {"ignore": [name]}}
    with pytest.raises(Refusal, match="cannot be renumbered"):
        surgery.cut_config(config, (0, 1), 4)
    assert surgery.cut_config(config, range(4), 4) == config  # a copy renumbers nothing


def test_names_of_blocks_follow_the_cut_wherever_they_stand() -> None:
    config = {
        "num_hidden_layers": 6,
        "_name_or_path": "/models/layers.5",
        "quantization_config": {
            "ignore": [
                r"re:^model\.layers\.3\.mlp.*",
                "re:.*lm_head",
                r"re:model\.layers\.\d+\.mlp",
                "vision_tower.layers.5.fc1",
                "model.layers.1.mlp",
            ],
            "extra_config": {"model.layers.2.mlp": {"bits": 8}, "model.layers.5.mlp": {"bits": 4}},
            "only": "model.layers.2.mlp",
        },
    }
    cut = surgery.cut_config(config, (0, 3, 4, 5), 6)
    assert cut["_name_or_path"] == "/models/layers.5"
    assert cut["quantization_config"] == {
        "ignore": [
            r"re:^model\.layers\.1\.mlp.*",
            "re:.*lm_head",
            r"re:model\.layers\.\d+\.mlp",
            "vision_tower.layers.5.fc1",
        ],
        "extra_config": {"model.layers.3.mlp": {"bits": 4}},
    }


def test_the_stack_is_found_by_its_numbers() -> None:
    def named(*stacks: tuple[str, int]) -> list[str]:
        return [f"{prefix}.{i}.weight" for prefix, count in stacks for i in range(count)]

    assert surgery.stack_prefix(named(("vision.layers", 4), ("model.layers", 4)), {}, 4) == "model.layers"
    assert surgery.stack_prefix(named(("h", 4), ("h.0.experts", 4)), {}, 4) == "h"
    assert surgery.stack_prefix(named(("model.layers", 5)), {"num_nextn_predict_layers": 1}, 4) == "model.layers"
    for stacks in ((("model.layers", 5),), (("a.layers", 4), ("b.layers", 4)), (("model.layers", 3),), ()):
        with pytest.raises(BadRequest, match="looked for one stack of 4 blocks"):
            surgery.stack_prefix(named(*stacks), {}, 4)


def test_plans_of_ranges() -> None:
    assert surgery.plan_removing(5, 1, 3, "").kept == (0, 3, 4)
    for start, stop, message in ((3, 6, "not within"), (2, 2, "not within"), (0, 5, "at least one must stay")):
        with pytest.raises(BadRequest, match=message):
            surgery.plan_removing(5, start, stop, "")


def test_a_view_shares_every_tensor_and_leaves_the_original_alone(model_folder: Path) -> None:
    import torch

    model = models.load(model_folder)
    ids = torch.arange(16)[None]
    with torch.inference_mode():
        before = model(ids).logits.clone()
        family = Family(model, (0, 1, 4, 5), {})
        with family.use("pruned") as pruned:
            cut = pruned(ids).logits
            with_cache = pruned.generate(ids, max_new_tokens=6, do_sample=False, use_cache=True)
            without = pruned.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(before, model(ids).logits)
    assert not torch.equal(before, cut) and torch.equal(with_cache, without)
    own = {p.data_ptr() for p in model.parameters()}
    assert {p.data_ptr() for p in family.pruned.parameters()} <= own
    assert len(model.model.layers) == model.config.num_hidden_layers == 6
    assert family.params("pruned") < family.params("original")
    with pytest.raises(BadRequest, match="no variant 'sft' here; there are original, pruned"), family.use("sft"):
        pass
