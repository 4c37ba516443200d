"""Adapters of trained arms on disk, and the stock checkpoint that one becomes when it is merged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from hfsd import models
from hfsd.errors import BadRequest, HfsdError
from hfsd.rundir import new_folder

if TYPE_CHECKING:
    from peft import PeftModel

FILES = ("adapter_config.json", "adapter_model.safetensors")


def check(folder: Path, asked_by: str) -> None:
    """Refuses a folder that holds no adapter, naming the field that asked for it."""
    if not (folder / FILES[0]).is_file():
        raise BadRequest(f"{asked_by}: {folder} holds no {FILES[0]}")


def keep(folder: Path, out: Path) -> None:
    """Copies an adapter, and nothing else that stands beside it: no card with local paths, no pickle."""
    with new_folder(out) as target:
        for name in FILES:
            shutil.copy2(folder / name, target / name)


def merge(adapter: Path, base: Path, out: Path, asked_by: str = "train") -> int:
    """Merges an adapter into a stock checkpoint and writes it, after checking that its logits equal the adapter's.

    Returns:
        The adapter's parameters.

    Raises:
        BadRequest: the adapter does not fit `base`.
        HfsdError: merging changed the logits.
    """
    from peft import PeftModel

    model = models.load(base)
    try:
        tuned = PeftModel.from_pretrained(model, adapter).eval()
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadRequest(f"{asked_by}: {adapter} does not fit {base}: {why}") from error
    params = sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)
    _merge(tuned, base, out)
    return params


def finish_checkpoint(base: Path, target: Path) -> None:
    """Copies what is not weights from the pruned checkpoint: tokenizer, template, generation config, provenance."""
    for path in sorted(base.iterdir()):
        if path.is_file() and "safetensors" not in path.name and path.name not in ("config.json", "README.md"):
            shutil.copy2(path, target / path.name)


def _merge(tuned: PeftModel, base: Path, out: Path) -> None:
    import torch

    ids = torch.arange(1, 25, device=tuned.device)[None, :]  # [1, T]
    with torch.inference_mode():
        expected = tuned(input_ids=ids, use_cache=False).logits.float()  # [1, T, V]
        merged = tuned.merge_and_unload()
        off = (merged(input_ids=ids, use_cache=False).logits.float() - expected).abs().max().item()
    tolerance = (1e-3 if merged.dtype == torch.float32 else 0.1) * max(1.0, expected.abs().max().item())
    if not off <= tolerance:
        raise HfsdError(
            f"merging changed the logits by {off:.3g}, more than {tolerance:.3g}; keep the adapter and report this"
        )
    with new_folder(out) as target:
        merged.save_pretrained(target)
        finish_checkpoint(base, target)
