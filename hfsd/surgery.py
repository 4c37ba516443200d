"""Which blocks stay -> new config, new tensor names, and a cut model in memory that shares the original's tensors.

Everything here takes `kept`: the indices, ascending and 0-based, of the blocks that stay.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hfsd.errors import BadRequest, Refusal
from hfsd.models import DEPTH_FIELDS, decoder_blocks, text_config
from hfsd.records import PrunePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Lists of block indices (not one entry per block): re-mapped to the new numbers.
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
# Lists whose length has nothing to do with the depth, even where it happens to be equal.
NOT_PER_BLOCK = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")
# "The first k blocks are dense": k shrinks by the removed ones below it.
LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
# Every k-th block differs, counted from block 0: a cut shifts the pattern against the weights.
CADENCES = (
    "decoder_sparse_step",
    "interleave_moe_layer_step",
    "moe_layer_frequency",
    "attn_layer_period",
    "expert_layer_period",
)
BLOCK_NAME = re.compile(r"(?<![A-Za-z0-9_])(layers|h|blocks|block)\.(\d+)(?=\.|$)")
LAYER_PATTERN = re.compile(r"(?:layers|h|blocks|block)\\?\.(?![0-9]+(?:\\?\.|$))[\\\[(*]")


def plan_removing(n_layers: int, start: int, stop: int, why: str) -> PrunePlan:
    """The plan that removes blocks [start, stop).

    Raises:
        BadRequest: the range leaves the model or leaves no block.
    """
    if not 0 <= start < stop <= n_layers:
        raise BadRequest(f"blocks [{start}, {stop}) are not within [0, {n_layers}), the blocks this model has")
    if stop - start == n_layers:
        raise BadRequest(f"blocks [{start}, {stop}) are all {n_layers} blocks; at least one must stay")
    return PrunePlan(n_layers, (*range(start), *range(stop, n_layers)), why)


def refuse_unsound(config: dict[str, Any], kept: Sequence[int], n_layers: int) -> None:
    """Refuses what cannot be cut soundly, by name and reason.

    Raises:
        Refusal: encoder-decoders, key-value sharing between blocks, a cadence that the cut would shift.
    """
    text = text_config(config)
    kind = text.get("model_type", config.get("model_type", "unknown"))
    if config.get("is_encoder_decoder"):
        raise Refusal(f"{kind} is an encoder-decoder; only decoder-only models can be cut")
    if len(kept) == n_layers:
        return
    if text.get("num_kv_shared_layers"):
        raise Refusal(
            f"{kind}: its last {text['num_kv_shared_layers']} blocks reuse the keys and values of earlier ones"
        )
    for name in CADENCES:
        step = text.get(name)
        if isinstance(step, int) and step > 1 and any((new - old) % step for new, old in enumerate(kept)):
            raise Refusal(
                f"{kind}: every {step}th block differs ({name}) and this cut would shift that; cut a multiple of {step}"
            )


def cut_config(config: dict[str, Any], kept: Sequence[int], n_layers: int) -> dict[str, Any]:
    """The config of the cut model: depth, per-block lists, index lists, and block names inside strings.

    Raises:
        Refusal: a string names blocks by a pattern that cannot be mapped.
    """
    config = copy.deepcopy(config)
    renumber = {old: new for new, old in enumerate(kept)}
    text = text_config(config)
    for name in DEPTH_FIELDS:
        if text.get(name) == n_layers:
            text[name] = len(kept)
    for name, value in text.items():
        if name in INDEX_LISTS and isinstance(value, list):
            text[name] = [renumber[i] for i in value if i in renumber]
        elif isinstance(value, list) and len(value) == n_layers and name not in NOT_PER_BLOCK:
            text[name] = [value[i] for i in kept]
        elif name in LEADING_COUNTS and isinstance(value, int):
            text[name] = sum(1 for i in kept if i < value)
    return _renamed(config, renumber)


def cut_name(name: str, prefix: str, kept: Sequence[int]) -> str | None:
    """The new name of a tensor, or None for a tensor of a removed block.

    Args:
        prefix: dotted name of the decoder stack in the checkpoint, such as `model.layers`.
    """
    found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    if not found:
        return name
    old = int(found[1])
    return f"{prefix}.{list(kept).index(old)}.{name[found.end() :]}" if old in kept else None


def view(model: PreTrainedModel, kept: Sequence[int]) -> PreTrainedModel:
    """A cut model whose parameters and buffers are the original's own tensors; its modules and config are copies.

    Adapters put on the view wrap the view's modules, so the original stays as it is.
    """
    from torch import nn

    config = model.config
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=dict(shared))
    name, blocks = decoder_blocks(twin)
    n_layers = len(blocks)
    parent = twin.get_submodule(name.rpartition(".")[0])
    setattr(parent, name.rpartition(".")[2], nn.ModuleList(blocks[i] for i in kept))
    for new, block in enumerate(parent.get_submodule(name.rpartition(".")[2])):
        for module in block.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = new  # the cache is addressed by it
    new_config = type(config).from_dict(cut_config(config.to_dict(), kept, n_layers))
    new_config._attn_implementation = config._attn_implementation
    for module in twin.modules():
        if getattr(module, "config", None) is not None:
            module.config = new_config if type(module.config) is type(new_config) else new_config.get_text_config()
    return twin


def _renamed(value: Any, renumber: dict[int, int]) -> Any:
    """Block indices inside strings (`quantization_config.modules_to_not_convert`, `ignore`) follow the cut."""
    if isinstance(value, dict):
        return {k: _renamed(v, renumber) for k, v in value.items()}
    if isinstance(value, list):
        mapped = [_renamed(v, renumber) for v in value]
        return [new for new, old in zip(mapped, value, strict=True) if not (isinstance(old, str) and new is None)]
    if not isinstance(value, str):
        return value
    if LAYER_PATTERN.search(value):
        raise Refusal(
            f"the config names blocks by the pattern {value!r}, which cannot be renumbered; list them one by one"
        )
    found = BLOCK_NAME.search(value)
    if not found:
        return value
    old = int(found[2])
    return BLOCK_NAME.sub(f"{found[1]}.{renumber[old]}", value, count=1) if old in renumber else None
