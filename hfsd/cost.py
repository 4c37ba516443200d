"""What a model costs, from its config alone: parameters, matmul FLOPs, cache and checkpoint bytes. No weight is read.

The class that the config asks for is built on the meta device, where tensors have a shape and no storage. Its cache is
that of a few tokens run through it there: so it is the class's own, be it grouped, latent, sliding or a state.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import models, shards, surgery
from hfsd.models import text_config

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

EXPERT = re.compile(r"(?<![A-Za-z0-9_])experts\.")  # not `shared_experts.`, which every token goes through
SHORT, LONG = 4, 6  # tokens of two runs, whose difference is what one more token adds


@dataclass(frozen=True)
class Shape:
    """What a model, or one block of it, costs.

    `params` counts tied tensors once. `matmul_flops` are per token: 2 per weight of the matrices that a token is
    multiplied with, the head included, the embedding look-up, norms and attention scores not; of experts, as many as a
    token is sent to. `kv_bytes` are what one more token adds to the cache, in `dtype`; None: the class gives no cache,
    and `kv_note` says why. `state_bytes` are what the layers hold at most that do not grow with the text: those with a
    state, and those with a window, once it is full. `checkpoint_bytes` are those of the tensors.
    """

    params: int
    matmul_flops: int
    kv_bytes: int | None
    checkpoint_bytes: int
    state_bytes: int | None = 0
    kv_note: str = ""
    dtype: str = "float32"

    def less(self, blocks: Iterable[Shape]) -> Shape:
        """This model without some of its blocks."""
        gone = list(blocks)
        return replace(
            self,
            params=self.params - sum(b.params for b in gone),
            matmul_flops=self.matmul_flops - sum(b.matmul_flops for b in gone),
            kv_bytes=_less(self.kv_bytes, [b.kv_bytes for b in gone]),
            checkpoint_bytes=self.checkpoint_bytes - sum(b.checkpoint_bytes for b in gone),
            state_bytes=_less(self.state_bytes, [b.state_bytes for b in gone]),
        )


def of_folder(folder: Path, trust_remote_code: bool = False, dtype: str | None = None) -> Shape:
    """The cost of the model in a folder; where its weights are there, too, `checkpoint_bytes` are those of the files.

    Args:
        dtype: in which the model is loaded, and so its cache is, such as `float32`; None: the config's own.

    Raises:
        BadRequest: transformers does not know the config.
    """
    config = models.load_config(folder, trust_remote_code)
    found, _ = by_block(config, trust_remote_code, dtype)
    if any(folder.glob("*.safetensors")):
        stored = sum(t.bytes for t in shards.read(folder))
    else:
        stored = of_config(config, trust_remote_code=trust_remote_code).checkpoint_bytes
    return replace(found, checkpoint_bytes=stored)


def of_config(config: PreTrainedConfig, kept: Sequence[int] | None = None, trust_remote_code: bool = False) -> Shape:
    """The cost of a config's model, or of what is left of it with the blocks `kept` (ascending, 0-based).

    Raises:
        Refusal: the architecture cannot be cut soundly there.
    """
    return by_block(cut(config, kept), trust_remote_code)[0]


def by_block(
    config: PreTrainedConfig, trust_remote_code: bool = False, dtype: str | None = None
) -> tuple[Shape, list[Shape]]:
    """The cost of a config's model, and that of each of its blocks, in a type, or in the config's own.

    A cut model costs as much as the whole one less the removed blocks, since blocks keep what they are when they are
    renumbered (`surgery` refuses the cuts for which that is not so).
    """
    model = empty(config, trust_remote_code, dtype)
    name, blocks = models.decoder_blocks(model)
    described = model.config.to_dict()
    whole, per_block = _cache(model, len(blocks))
    held_in = str(model.dtype).removeprefix("torch.")
    shapes = [
        _shape(block, 2 * matmul_weights(_shapes(block), described), held, held_in)
        for block, held in zip(blocks, per_block, strict=True)
    ]
    stack = _shapes(model.get_submodule(name))
    return _shape(model, 2 * (matmul_weights(stack, described) + head_weights(described)), whole, held_in), shapes


def cut(config: PreTrainedConfig, kept: Sequence[int] | None) -> PreTrainedConfig:
    """The config of the cut model; None: a copy."""
    if kept is None:
        return copy.deepcopy(config)
    described = config.to_dict()
    n_layers = config.get_text_config(decoder=True).num_hidden_layers
    surgery.refuse_unsound(described, kept, n_layers)
    return type(config).from_dict(surgery.cut_config(described, kept, n_layers))


def empty(config: PreTrainedConfig, trust_remote_code: bool = False, dtype: str | None = None) -> PreTrainedModel:
    """The model of a config on the meta device. Experts are computed by shape: which ones a token takes is unknown."""
    config = copy.deepcopy(config)
    config._experts_implementation = "batched_mm"
    return models.empty(config, trust_remote_code, dtype=dtype)


def matmul_weights(shapes: Iterable[tuple[str, Sequence[int]]], config: dict[str, Any]) -> int:
    """Weights of the blocks' matrices that one token is multiplied with, the short convolutions among them.

    Args:
        shapes: names and shapes of the blocks' tensors, as a module or as a checkpoint names them (experts of one
            tensor, or one by one).
        config: of experts, `num_experts_per_tok` are counted.
    """
    text = text_config(config)
    counts = (text.get(name) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    experts = next((n for n in counts if isinstance(n, int) and n > 0), 0)
    taken = text.get("num_experts_per_tok")
    every, of_experts = 0, 0
    for name, shape in shapes:
        if len(shape) < 2 or "bias" in name.rpartition(".")[2]:
            continue
        stacked = len(shape) == 3 and shape[0] == experts and shape[1] > 1  # [E, out, in]; a convolution is [C, 1, K]
        if experts and isinstance(taken, int) and (stacked or EXPERT.search(name)):
            of_experts += math.prod(shape)
        else:
            every += math.prod(shape)
    return every + of_experts * int(taken or 0) // max(experts, 1)


def head_weights(config: dict[str, Any]) -> int:
    """Weights of the matrix that gives the logits, which a tied model multiplies with, too."""
    text = text_config(config)
    return int(text.get("vocab_size", 0)) * int(text.get("hidden_size", text.get("n_embd", 0)))


def _less(whole: int | None, gone: Sequence[int | None]) -> int | None:
    known = [n for n in gone if n is not None]
    return None if whole is None or len(known) < len(gone) else whole - sum(known)


def _shape(part: nn.Module, matmul_flops: int, held: tuple[int | None, int | None, str], dtype: str) -> Shape:
    # state_dict: what a checkpoint holds, with the buffers that belong to it; a tied tensor is one object
    stored = {id(t): t for t in part.state_dict(keep_vars=True).values()}
    kv_bytes, state_bytes, note = held
    size = sum(t.numel() * t.element_size() for t in stored.values())
    return Shape(models.count_params(part), matmul_flops, kv_bytes, size, state_bytes, note, dtype)


def _shapes(part: nn.Module) -> list[tuple[str, Sequence[int]]]:
    return [(name, tuple(p.shape)) for name, p in part.named_parameters()]


def _cache(
    model: PreTrainedModel, n_layers: int
) -> tuple[tuple[int | None, int | None, str], list[tuple[int | None, int | None, str]]]:
    """Of the model and of each block: bytes that a token adds, bytes of what does not grow, and why there are none."""

    def unknown(why: str) -> Any:
        return (None, None, why), [(None, None, why)] * n_layers

    try:
        short, long = (_layers_after(model, tokens) for tokens in (SHORT, LONG))
    except Exception as error:  # whatever a class says that cannot run without storage; the record tells it
        return unknown(f"{type(model).__name__} does not run on shapes alone: {' '.join(str(error).split())[:200]}")
    if short is None or long is None:
        return unknown(f"{type(model).__name__} gives no cache")
    found = [_layer(a, b) for a, b in zip(short, long, strict=True)]
    total = (sum(kv for kv, _ in found), sum(state for _, state in found), "")
    if len(found) != n_layers:
        return total, [(None, None, f"{len(found)} layers of the cache for {n_layers} blocks")] * n_layers
    return total, [(kv, state, "") for kv, state in found]


def _layers_after(model: PreTrainedModel, tokens: int) -> list[Any] | None:
    import torch

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")  # [1, T]
    with torch.inference_mode(), models.quiet():
        cache = model.eval()(input_ids=ids, use_cache=True).past_key_values
    return getattr(cache, "layers", None)


def _layer(short: Any, long: Any) -> tuple[int, int]:
    """Bytes that one more token adds to a layer, and bytes that it holds whatever comes."""
    window = getattr(long, "sliding_window", None)
    if isinstance(window, int):
        # It keeps the window less the token that comes; windows shorter than the runs are full in both of them.
        kept = long.keys.shape[-2]
        per_token = _bytes(vars(long)["keys"], vars(long)["values"]) // max(kept, 1)
        return 0, per_token * (window - 1) + _held(long, "keys", "values")
    grown, fixed = _held(long), _held(short)
    per_token = (grown - fixed) // (LONG - SHORT)
    return per_token, fixed - SHORT * per_token


def _held(layer: Any, *leave_out: str) -> int:
    """Bytes of the tensors that a layer of a cache holds for a sequence, in its fields or in dicts of states."""
    found: list[torch.Tensor] = []
    for name, value in vars(layer).items():
        if name not in leave_out and not name.startswith("_"):
            found += value.values() if isinstance(value, dict) else [value]
    return _bytes(*found)


def _bytes(*tensors: Any) -> int:
    import torch

    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
