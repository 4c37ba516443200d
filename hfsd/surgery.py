"""Which blocks stay -> new config, new tensor names, and a cut model in memory that shares the original's tensors.

Everything here takes `kept`: the indices, ascending and 0-based, of the blocks that stay.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import models
from hfsd.blocks_cut import Prune
from hfsd.errors import BadRequest, Refusal
from hfsd.models import DEPTH_FIELDS, decoder_blocks, outermost, text_config
from hfsd.records import PrunePlan

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Architectures that the tests cut at every place with both levels of the self-check (tests/architectures.py): for
# these alone the numeric level may be left out.
TESTED = frozenset(
    "cohere2 deepseek_v3 falcon gemma2 gemma3 gemma3_text gpt2 gpt_neox gpt_oss granite granitemoehybrid lfm2 llama "
    "llama4_text mistral mixtral olmo2 olmo3 opt phi3 qwen2 qwen3 qwen3_moe qwen3_next smollm3 stablelm".split()
)
# Lists of block indices (not one entry per block): re-mapped to the new numbers.
INDEX_LISTS = ("mlp_only_layers", "moe_layers", "full_attn_idxs")
# Lists whose length has nothing to do with the depth, even where it happens to be equal.
NOT_PER_BLOCK = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id")
# "The first k blocks are dense": k shrinks by the removed ones below it.
LEADING_COUNTS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
# Blocks behind the stack that predict further tokens: trained for the uncut model, left out of a cut one.
EXTRA_BLOCKS = "num_nextn_predict_layers"
# Every k-th block differs, counted from block 0: a cut shifts the pattern against the weights. Beside each, the list
# that says the same block by block and, where the config has it, goes before the cadence.
CADENCES = {
    "decoder_sparse_step": None,
    "moe_layer_freq": None,
    "moe_layer_frequency": None,
    "attn_layer_period": None,
    "expert_layer_period": None,
    "interleave_moe_layer_step": "moe_layers",
    "no_rope_layer_interval": "no_rope_layers",
    "sliding_window_pattern": "layer_types",
}
# Flags under which a block computes with its own index.
BY_INDEX = ("scale_attn_by_inverse_layer_idx",)
OTHER_TOWER = re.compile(r"vision|visual|audio|speech|image")
# A block's number in a module name, plain or escaped for a regular expression.
BLOCK_NAME = re.compile(r"(?<![A-Za-z0-9_])((?:layers|h|blocks|block)\\?\.)(\d+)(?=\\?\.|\$?$)")
PATTERN = re.compile(r"[*\[(|?]|^re:")  # a glob or a regular expression
PATHS = ("_name_or_path", "transformers_version", "auto_map")  # strings that name no module


def plan_removing(n_layers: int, start: int, stop: int, why: str) -> PrunePlan:
    """The plan that removes blocks [start, stop).

    Raises:
        BadRequest: the range leaves the model or leaves no block.
    """
    if not 0 <= start < stop <= n_layers:
        raise BadRequest(f"blocks [{start}, {stop}) are not within [0, {n_layers}), the blocks this model has")
    return plan_keeping(n_layers, (*range(start), *range(stop, n_layers)), why)


def plan_keeping(n_layers: int, kept: Sequence[int], why: str) -> PrunePlan:
    """The plan that keeps the blocks `kept` (ascending) and removes the others.

    Raises:
        BadRequest: no block is left, or one is kept that the model does not have.
    """
    if not kept:
        raise BadRequest(f"all {n_layers} blocks would go; at least one must stay")
    if wrong := [i for i in kept if not 0 <= i < n_layers]:
        raise BadRequest(f"block {wrong[0]} is not within [0, {n_layers}), the blocks this model has")
    return PrunePlan(n_layers, tuple(kept), why)


def plan_by_hand(n_layers: int, asked: Prune) -> PrunePlan:
    """The plan of a recipe that names the blocks itself, by `remove`, by `keep`, or by `blocks: 0` (a copy)."""
    if asked.range is not None:
        return plan_removing(n_layers, *asked.range, why="given by hand")
    return plan_keeping(n_layers, asked.kept or range(n_layers), why="given by hand" if asked.kept else "a copy")


def described(folder: Path, trust_remote_code: bool = False) -> dict[str, Any]:
    """config.json with the per-block lists that its class derives where the file leaves them out.

    Many files do: they say "every 6th layer", or nothing, and the class fills in `layer_types`. A cut has to slice the
    lists; the class would derive them anew, for other blocks than they were.
    """
    config, n_layers = models.config_dict(folder), models.depth(folder)
    made = models.load_config(folder, trust_remote_code).to_dict()
    text = text_config(config)
    for name, value in text_config(made).items():
        if not isinstance(value, list) or not value or name in NOT_PER_BLOCK:
            continue
        stated = text.get(name)
        if (len(value) == n_layers or name in INDEX_LISTS) and not (isinstance(stated, list) and stated):
            text[name] = value
    return config


def refuse_unsound(config: dict[str, Any], kept: Sequence[int], n_layers: int) -> None:
    """Refuses what cannot be cut soundly, by name and reason.

    Raises:
        Refusal: encoder-decoders, key-value sharing between blocks, a cadence or an index that the cut would shift.
    """
    text, kind = text_config(config), models.kind_of(config)
    if config.get("is_encoder_decoder"):
        raise Refusal(f"{kind} is an encoder-decoder; only decoder-only models can be cut")
    if len(kept) == n_layers:
        return
    if text.get("num_kv_shared_layers"):
        raise Refusal(
            f"{kind}: its last {text['num_kv_shared_layers']} blocks reuse the keys and values of earlier ones"
        )
    shifts = {old - new for new, old in enumerate(kept)}
    for name, instead in CADENCES.items():
        step = text.get(name)
        if instead is not None and text.get(instead):
            continue
        if isinstance(step, int) and step > 1 and any(shift % step for shift in shifts):
            raise Refusal(
                f"{kind}: one block in {step} differs ({name}) and this cut would shift that; cut a multiple of {step}"
            )
    for name in BY_INDEX:
        if text.get(name) and shifts != {0}:
            raise Refusal(f"{kind}: its blocks compute with their own index ({name}); only its last blocks can go")


def cut_config(config: dict[str, Any], kept: Sequence[int], n_layers: int) -> dict[str, Any]:
    """The config of the cut model: depth, per-block lists, index lists, and block names inside strings.

    Raises:
        Refusal: a string names blocks by a pattern that cannot be mapped.
    """
    config = copy.deepcopy(config)
    if len(kept) == n_layers:
        return config
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
        elif name == EXTRA_BLOCKS:
            text[name] = 0
    return _renamed(config, renumber)


def stack_prefix(names: Iterable[str], config: dict[str, Any], n_layers: int) -> str:
    """The dotted name under which a checkpoint stores the blocks 0 .. n_layers-1, such as `model.layers`.

    Further blocks behind the stack (multi-token prediction) may follow; a vision or audio tower is none.

    Raises:
        BadRequest: there is no such stack, or more than one.
    """
    depths = (n_layers, n_layers + (text_config(config).get(EXTRA_BLOCKS) or 0))
    numbers: dict[str, set[int]] = {}
    for name in names:
        for found in re.finditer(r"\.(\d+)(?=\.)", name):
            numbers.setdefault(name[: found.start()], set()).add(int(found[1]))
    stacks = outermost(p for p, seen in numbers.items() if any(seen == set(range(d)) for d in depths))
    fits = [p for p in stacks if not OTHER_TOWER.search(p)]
    if len(fits) != 1:
        here = ", ".join(f"{p} ({len(numbers[p])} blocks)" for p in outermost(numbers)) or "none"
        raise BadRequest(f"looked for one stack of {n_layers} blocks in the tensor names and found: {here}")
    return fits[0]


def cut_name(name: str, prefix: str, plan: PrunePlan) -> str | None:
    """The new name of a tensor, or None for a tensor of a removed block.

    Args:
        prefix: dotted name of the decoder stack in the checkpoint, such as `model.layers`.
    """
    found = re.match(rf"{re.escape(prefix)}\.(\d+)\.", name)
    if not found or len(plan.kept) == plan.n_layers:
        return name
    old = int(found[1])
    return f"{prefix}.{plan.kept.index(old)}.{name[found.end() :]}" if old in plan.kept else None


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
    """Block numbers in module names (`modules_to_not_convert`, `ignore`, keys of per-module settings) follow the cut.

    Returns:
        The value; None for a string that names a removed block.
    """
    if isinstance(value, dict):
        renamed = {_new_name(k, renumber): v if k in PATHS else _renamed(v, renumber) for k, v in value.items()}
        gone = {_new_name(k, renumber) for k, v in value.items() if isinstance(v, str)}
        return {k: v for k, v in renamed.items() if k is not None and not (v is None and k in gone)}
    if isinstance(value, list):
        mapped = [_renamed(v, renumber) for v in value]
        return [new for new, old in zip(mapped, value, strict=True) if not (isinstance(old, str) and new is None)]
    return _new_name(value, renumber)


def _new_name(value: Any, renumber: dict[int, int]) -> Any:
    if not isinstance(value, str) or OTHER_TOWER.search(value):
        return value
    found = BLOCK_NAME.search(value)
    rest = value if not found else value[: found.start()] + value[found.end() :]
    if PATTERN.search(value) and re.search(r"\d", rest):
        raise Refusal(
            f"the config names blocks by the pattern {value!r}, which cannot be renumbered; list them one by one"
        )
    if not found:
        return value
    old = int(found[2])
    return value[: found.start(2)] + str(renumber[old]) + value[found.end(2) :] if old in renumber else None
