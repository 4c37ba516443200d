"""Adapters of trained arms on disk, and the stock checkpoint that one becomes when it is merged."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import models, shards
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.rundir import new_folder

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

FILES = ("adapter_config.json", "adapter_model.safetensors")
STARTS = (True, False, "gaussian", "orthogonal")  # the ways to start LoRA that leave the base's weights as they are


def faults(lora: Mapping[str, Any]) -> list[str]:
    """What an adapter must not do: change weights of the base, which variants share in memory, beside its own."""
    found = []
    start, bias = lora.get("init_lora_weights", True), lora.get("bias", "none")
    if start not in STARTS:
        found.append(
            f"init_lora_weights: {start!r} rewrites the base's weights, which all variants share; use one of "
            f"{', '.join(map(str, STARTS))}"
        )
    if bias != "none":
        found.append(f"bias: {bias!r} trains the base's biases, which all variants share; leave it at none")
    return found


def check(folder: Path, asked_by: str) -> None:
    """Refuses a folder that holds no adapter that can be used here, naming the field that asked for it."""
    for name in FILES:
        if not (folder / name).is_file():
            raise BadRequest(f"{asked_by}: {folder} holds no {name}")
    config = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
    if wrong := faults(config):
        raise Refusal(f"{asked_by}: {folder / FILES[0]}: {wrong[0]}")


def keep(folder: Path, out: Path) -> None:
    """Copies an adapter, and nothing else that stands beside it: no card with local paths, no pickle."""
    with new_folder(out) as target:
        for name in FILES:
            shutil.copy2(folder / name, target / name)


def merge(adapter: Path, base: Path, out: Path, asked_by: str = "train", trust_remote_code: bool = False) -> int:
    """Merges an adapter into a stock checkpoint and writes it, after checking that its logits equal the adapter's.

    Returns:
        The adapter's parameters.

    Raises:
        BadRequest: the adapter does not fit `base`.
        HfsdError: merging changed the logits.
    """
    from peft import PeftModel

    model = models.load(base, trust_remote_code=trust_remote_code)
    try:
        tuned = PeftModel.from_pretrained(model, adapter).eval()
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadRequest(f"{asked_by}: {adapter} does not fit {base}: {why}") from error
    params = sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)
    _write(_merged(tuned), base, out)
    return params


def whole(trained: Path, base: Path, out: Path, trust_remote_code: bool = False) -> None:
    """Writes a model whose every weight was trained as a stock checkpoint like `base`."""
    shutil.copy2(base / "config.json", trained / "config.json")  # training writes its own settings into it
    _write(models.load(trained, "float32", trust_remote_code), base, out)


def _merged(tuned: PeftModel) -> PreTrainedModel:
    import torch

    ids = torch.arange(1, 25, device=tuned.device)[None, :]  # [1, T]
    with torch.inference_mode():
        expected = tuned(input_ids=ids, use_cache=False).logits.float()  # [1, T, V]
        merged = tuned.merge_and_unload()
        off = (merged(input_ids=ids, use_cache=False).logits.float() - expected).abs()
    exact = merged.dtype == torch.float32
    # In half precision single logits move by rounding; all of them together do not.
    moved = off.max().item() if exact else off.mean().item()
    allowed = 1e-3 * max(1.0, expected.abs().max().item()) if exact else 0.02 * expected.std().item()
    if not moved <= allowed:
        raise HfsdError(
            f"merging changed the logits by {moved:.3g}, more than {allowed:.3g}; keep the adapter and report this"
        )
    return merged


def _write(model: PreTrainedModel, base: Path, out: Path) -> None:
    """Weights in the type of the base's files; what is not weights is the pruned checkpoint's, byte for byte."""
    import torch

    counts = Counter[str]()
    for tensor in shards.read(base):
        counts[tensor.dtype] += tensor.numel
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}.get(counts.most_common(1)[0][0])
    with new_folder(out) as target:
        (model if stored is None else model.to(stored)).save_pretrained(target)
        for path in sorted(base.iterdir()):
            if path.is_file() and "safetensors" not in path.name and path.name not in ("config.json", "README.md"):
                shutil.copy2(path, target / path.name)
