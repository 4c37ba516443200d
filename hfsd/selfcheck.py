"""The self-check of a pruned checkpoint, in two levels, before it gets its name.

`structure` needs no weights: transformers' own loader takes the written headers as tensors without storage. `numeric`
compares with the untouched original, in which each removed block hands its input on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import models, shards, surgery
from hfsd.errors import HfsdError, Refusal
from hfsd.records import Check, PrunePlan

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel

TOLERANCE = 1e-4  # of the largest logit; both sides are computed in float32, in the same order
WINDOWS, WINDOW = ("sliding_window", "attention_chunk_size"), 8
PROMPT, TOKENS = 24, 8  # tokens of the prompts compared, and tokens generated with and without a cache


def structure(folder: Path, trust_remote_code: bool = False) -> Check:
    """Level `structure`: the class that the new config asks for finds its names, shapes and tied keys in the headers.

    Raises:
        HfsdError: tensors are missing, left over, or of another shape.
    """
    from transformers.modeling_utils import load_state_dict

    written: dict[str, torch.Tensor] = {}
    for name in sorted({t.file.name for t in shards.read(folder)}):
        written |= load_state_dict(folder / name, map_location="meta")
    empty = models.skeleton(folder, trust_remote_code)
    kind = type(empty)
    try:
        info = models.loading_report(empty, written)
    except RuntimeError as error:  # another shape, or a tensor that the loader cannot put together
        raise HfsdError(_misfit(kind, str(error))) from None
    except ImportError as error:  # the library that reads this storage
        raise HfsdError(f"the new checkpoint cannot be checked: {' '.join(str(error).split())}") from None
    faults = [
        f"{what} {sorted(map(str, info[key]))[:3]}"
        for what, key in (("missing", "missing_keys"), ("left over", "unexpected_keys"), ("shape", "mismatched_keys"))
        if info[key]
    ]
    if faults:
        raise HfsdError(_misfit(kind, ", ".join(faults)))
    return Check("structure", "passed", f"{len(written)} tensors as {kind.__name__} wants them")


def numeric(source: Path, cut: Path, plan: PrunePlan, check: str, trust_remote_code: bool = False) -> Check:
    """Level `numeric`: reloaded logits equal the untouched original's with the removed blocks made the identity.

    Args:
        check: `numeric` runs it, `structure` leaves it out, `auto` runs it where the original fits in half of the free
            memory. An architecture that is not in the table of tested ones is never let through without it.

    Raises:
        HfsdError: the logits differ, or generation with a cache differs from generation without.
        Refusal: the architecture needs this level, and the original does not fit.
    """
    needed = _reason_needed(source)
    if check == "structure" and not needed:
        return Check("numeric", "not run: check is structure")
    fault = _does_not_fit(source)
    if check != "numeric" and needed and fault:
        raise Refusal(f"{needed}, and {fault}; run it on a larger machine, or here with --check numeric")
    if check == "auto" and fault:
        return Check("numeric", f"not run: {fault}")
    original = _loaded(source, trust_remote_code)
    ids = _prompts(original)
    with without_blocks(original, plan.removed):
        expected = _logits(original, ids)
    del original  # two models are never held at once
    pruned = _loaded(cut, trust_remote_code)
    off = (_logits(pruned, ids) - expected).abs().max().item()
    if not off <= TOLERANCE * max(1.0, expected.abs().max().item()):
        raise HfsdError(
            f"self-check failed: logits of the cut {models.kind_of(models.config_dict(source))} are off by {off:.3g}; "
            "its blocks depend on their index, so this cut is not sound"
        )
    cached = _generated(pruned, ids, use_cache=True)
    if cached == _generated(pruned, ids, use_cache=False):
        return Check("numeric", "passed", f"largest difference in logits {off:.2g}; cached generation equals uncached")
    del pruned
    original = _loaded(source, trust_remote_code)
    with without_blocks(original, plan.removed):
        if cached != _generated(original, ids, use_cache=True):
            raise HfsdError("self-check failed: generation with a cache differs from generation without one")
    # Activations that are rounded to 8 bits fall to either side with the last bit of a sum, cut or not.
    return Check(
        "numeric", "passed", f"largest difference in logits {off:.2g}; cached generation equals the original's"
    )


@contextmanager
def without_blocks(model: PreTrainedModel, removed: Sequence[int]) -> Iterator[None]:
    """The untouched model with each removed block's output replaced by its input. Nothing is renumbered."""

    def identity(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]  # [B, T, D]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    _, blocks = models.decoder_blocks(model)
    hooks = [blocks[i].register_forward_hook(identity, with_kwargs=True) for i in removed]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _loaded(folder: Path, trust_remote_code: bool) -> PreTrainedModel:
    """In float32, with windows that the short prompts do not fit into: else a block's window would not show."""
    config = models.load_config(folder, trust_remote_code)
    text = config.get_text_config()
    for name in WINDOWS:
        if isinstance(getattr(text, name, None), int) and getattr(text, name) > WINDOW:
            setattr(text, name, WINDOW)
    return models.load(folder, "float32", trust_remote_code, config=config)


def _misfit(kind: type, why: str) -> str:
    return f"the new checkpoint does not fit its class {kind.__name__}: {' '.join(why.split())[:300]}"


def _reason_needed(source: Path) -> str | None:
    config = models.config_dict(source)
    kind = str(config.get("model_type", "model"))
    if config.get("auto_map"):
        return f"{kind} brings code of its own and needs check numeric"
    return None if kind in surgery.TESTED else f"{kind} is not among the tested architectures and needs check numeric"


def _does_not_fit(source: Path) -> str | None:
    """Why the numeric level is too much for this machine, or None. Numbers are computed in float32."""
    import psutil

    needed, free = 4 * sum(t.numel for t in shards.read(source)), psutil.virtual_memory().available
    if needed <= free / 2:
        return None
    return (
        f"the original in float32 ({needed / 1e9:.1f} GB) does not fit in half of the free memory ({free / 1e9:.1f} GB)"
    )


def _prompts(model: PreTrainedModel) -> torch.Tensor:
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (2, PROMPT), generator=generator).to(model.device)  # [B, T]


def _logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.inference_mode():
        return model(input_ids=ids, use_cache=False).logits.float()  # [B, T, V]


def _generated(model: PreTrainedModel, ids: torch.Tensor, use_cache: bool) -> list[int]:
    """Tokens of greedy generation."""
    import torch

    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        return model.generate(ids[:1, : PROMPT // 2], use_cache=use_cache, **options)[0].tolist()
