"""Prune: a stock checkpoint without some of its blocks, by copying tensor bytes, and its self-check.

No tensor passes through torch for the copy: headers are rewritten, bytes move with `copy_file_range`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import models, surgery
from hfsd.errors import BadRequest, HfsdError
from hfsd.records import Check, Checkpoint, ModelRef, Provenance, PrunePlan, dumps, load
from hfsd.rundir import link_or_copy, new_folder, sha256, write_atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROVENANCE = "hfsd.json"
SHARD_BYTES = 4 << 30
# Beside the weights, these travel as they are; generation config, chat template and tokenizer stay untouched.
LEFT_BEHIND = re.compile(
    r"(\.safetensors|\.bin|\.pt|\.gguf|\.index\.json|README\.md|^config\.json|^hfsd\.json|\.DS_Store)$"
)
STACK = re.compile(r"^((?:.*\.)?(?:layers|h|blocks|block))\.\d+\.")


@dataclass(frozen=True)
class Tensor:
    """One tensor's place in a safetensors file: bytes [start, stop) of the file."""

    name: str
    file: Path
    dtype: str
    shape: list[int]
    start: int
    stop: int


def run(
    source: Path, ref: ModelRef, plan: PrunePlan, out: Path, check: str = "auto", trust_remote_code: bool = False
) -> Checkpoint:
    """Writes the cut checkpoint to a new folder `out` and checks it before the folder gets its name.

    Args:
        source: a folder with config.json and safetensors.
        ref: what the source is, for the provenance in hfsd.json.
        check: `structure`, `numeric`, or `auto` (numeric where the original fits in half of the free memory).

    Raises:
        Refusal: the architecture cannot be cut soundly there.
        HfsdError: the checkpoint is corrupt, the disk is full, or the self-check failed; nothing is left behind.
    """
    if check not in ("auto", "structure", "numeric"):
        raise BadRequest(f"check: {check!r} is none of auto, structure, numeric")
    models.check_folder(source)
    config = models.config_dict(source)
    surgery.refuse_unsound(config, plan.kept, plan.n_layers)
    tensors = read_tensors(source)
    prefix = _stack_prefix(tensors, plan.n_layers)
    kept = [(new, t) for t in tensors if (new := surgery.cut_name(t.name, prefix, plan.kept)) is not None]
    _check_space(out, sum(t.stop - t.start for _, t in kept))
    with new_folder(out) as target:
        for path in sorted(source.iterdir()):
            if path.is_file() and not LEFT_BEHIND.search(path.name):
                shutil.copy2(path, target / path.name)
        new_config = surgery.cut_config(config, plan.kept, plan.n_layers)
        write_atomic(target / "config.json", json.dumps(new_config, indent=2, sort_keys=True) + "\n")
        write_atomic(target / PROVENANCE, dumps(_provenance(source, ref, plan)))
        _write_shards(kept, target)
        checks = [_check_structure(target), _check_numeric(source, target, plan, check, trust_remote_code)]
    return _record(source, out, plan, checks)


def adopt(source: Path, cut: Path, out: Path, check: str = "auto", trust_remote_code: bool = False) -> Checkpoint:
    """Takes a pruned checkpoint that the user already has: hard-linked or copied, checked against the original.

    Raises:
        BadRequest: its hfsd.json, which says which blocks it keeps, is missing.
    """
    models.check_folder(cut)
    if not (cut / PROVENANCE).is_file():
        raise BadRequest(
            f"prune.from: {cut} has no {PROVENANCE}, so which blocks it keeps is unknown; cut it with `hfsd prune`"
        )
    kept = load(Provenance, cut / PROVENANCE)
    plan = PrunePlan(kept.n_layers, kept.kept, kept.why)
    if plan.n_layers != models.depth(source):
        raise BadRequest(
            f"prune.from: {cut} was cut from {plan.n_layers} blocks, this original has {models.depth(source)}"
        )
    with new_folder(out) as target:
        for path in sorted(p for p in cut.iterdir() if p.is_file()):
            link_or_copy(path, target / path.name)
        checks = [_check_structure(target), _check_numeric(source, target, plan, check, trust_remote_code)]
    return _record(source, out, plan, checks)


def _record(source: Path, out: Path, plan: PrunePlan, checks: list[Check]) -> Checkpoint:
    before = read_tensors(source)
    prefix = _stack_prefix(before, plan.n_layers)
    matmul = removed = 0
    for tensor in before:
        if not tensor.name.startswith(f"{prefix}.") or len(tensor.shape) < 2:
            continue
        matmul += _numel(tensor.shape)
        if surgery.cut_name(tensor.name, prefix, plan.kept) is None:
            removed += _numel(tensor.shape)
    text = models.text_config(models.config_dict(source))
    head = int(text.get("vocab_size", 0)) * int(text.get("hidden_size", text.get("n_embd", 0)))
    return Checkpoint(
        path=out.name,
        sha256={p.name: sha256(p) for p in sorted(out.glob("*.safetensors"))},
        params=sum(_numel(t.shape) for t in read_tensors(out)),
        original_params=sum(_numel(t.shape) for t in before),
        matmul_flop_cut=removed / (matmul + head),
        plan=plan,
        checks=checks,
    )


def _provenance(source: Path, ref: ModelRef, plan: PrunePlan) -> Provenance:
    """Cutting a cut model: its blocks keep the numbers they had in the first original."""
    if not (source / PROVENANCE).is_file():
        return Provenance(ref, plan.n_layers, plan.kept, plan.why)
    before = load(Provenance, source / PROVENANCE)
    return Provenance(
        before.original, before.n_layers, tuple(before.kept[i] for i in plan.kept), f"{before.why}; {plan.why}"
    )


def read_tensors(folder: Path) -> list[Tensor]:
    """Every tensor of a checkpoint from the headers of its safetensors files.

    Raises:
        HfsdError: a header or a length is wrong, a tensor appears twice, or the index names a file that is not there.
    """
    index = folder / "model.safetensors.index.json"
    weight_map: dict[str, str] | None = None
    if index.is_file():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = [folder / name for name in sorted(set(weight_map.values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    tensors = [t for file in files for t in _read_header(file)]
    names = [t.name for t in tensors]
    if len(set(names)) != len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise HfsdError(f"{folder}: tensor {twice} is in more than one file; fetch the checkpoint again")
    if weight_map is not None and (absent := set(weight_map) - set(names)):
        raise HfsdError(
            f"{folder}: the index names {sorted(absent)[0]}, which no file holds; fetch the checkpoint again"
        )
    return tensors


def _read_header(file: Path) -> list[Tensor]:
    try:
        size = file.stat().st_size
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length)) if length <= size - 8 else None
        if header is None:
            raise ValueError("its header is longer than the file")
        header.pop("__metadata__", None)
        begin = 8 + length
        tensors = [
            Tensor(n, file, v["dtype"], v["shape"], begin + v["data_offsets"][0], begin + v["data_offsets"][1])
            for n, v in header.items()
        ]
        if max((t.stop for t in tensors), default=begin) != size:
            raise ValueError(f"it has {size} bytes where the header needs {max(t.stop for t in tensors)}")
    except FileNotFoundError:
        raise HfsdError(f"{file} is missing; fetch the checkpoint again") from None
    except (ValueError, KeyError, TypeError) as error:
        raise HfsdError(f"{file} is corrupt or truncated: {error}; fetch the checkpoint again") from None
    return tensors


def _stack_prefix(tensors: Sequence[Tensor], n_layers: int) -> str:
    """The dotted name under which exactly the blocks 0..n_layers-1 are stored."""
    blocks: dict[str, set[int]] = {}
    for tensor in tensors:
        if found := STACK.match(tensor.name):
            number = int(tensor.name[found.end(1) + 1 :].split(".")[0])
            blocks.setdefault(found[1], set()).add(number)
    fits = [p for p, numbers in blocks.items() if numbers == set(range(n_layers))]
    if len(fits) != 1:
        found_here = ", ".join(f"{p} ({len(n)} blocks)" for p, n in sorted(blocks.items())) or "none"
        raise BadRequest(f"looked for one stack of {n_layers} blocks in the tensor names and found: {found_here}")
    return fits[0]


def _check_space(out: Path, needed: int) -> None:
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if free < needed * 1.01 + (64 << 20):
        raise HfsdError(
            f"{parent} has {free / 1e9:.1f} GB free, the cut checkpoint needs {needed / 1e9:.1f} GB; free some space"
        )


def _write_shards(tensors: Sequence[tuple[str, Tensor]], target: Path) -> None:
    shards: list[list[tuple[str, Tensor]]] = [[]]
    filled = 0
    for name, tensor in tensors:
        size = tensor.stop - tensor.start
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += size
    if len(shards) == 1:
        _write_file(shards[0], target / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, target / file)
        weight_map |= {name: file for name, _ in shard}
    total = sum(t.stop - t.start for _, t in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomic(target / "model.safetensors.index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(tensors: Sequence[tuple[str, Tensor]], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        stop = offset + tensor.stop - tensor.start
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns the data to 8 bytes
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.flush()
        for _, tensor in tensors:
            _copy_bytes(tensor, handle.fileno())
        os.fsync(handle.fileno())


def _copy_bytes(tensor: Tensor, target: int) -> None:
    with open(tensor.file, "rb") as handle:
        at, left = tensor.start, tensor.stop - tensor.start
        while left:
            try:
                moved = os.copy_file_range(handle.fileno(), target, left, offset_src=at)
            except OSError:  # another file system (EXDEV), or one without it: plain reads; a full disk fails there too
                handle.seek(at)
                chunk = handle.read(min(left, 8 << 20))
                os.write(target, chunk) if chunk else None
                moved = len(chunk)
            if not moved:
                raise HfsdError(f"{tensor.file} ended inside {tensor.name}; fetch the checkpoint again")
            at, left = at + moved, left - moved


def _numel(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _check_structure(folder: Path) -> Check:
    """Level `structure`: the class built on the meta device wants exactly the tensors that were written."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    wanted = {n: list(p.shape) for n, p in model.named_parameters(remove_duplicate=False)}
    tied = set(model.all_tied_weights_keys)
    written = {t.name: t.shape for t in read_tensors(folder)}
    missing = sorted(set(wanted) - set(written) - tied)
    left_over = sorted(set(written) - set(model.state_dict()))
    wrong = sorted(n for n in written.keys() & wanted.keys() if written[n] != wanted[n])
    if missing or left_over or wrong:
        raise HfsdError(
            f"the cut checkpoint does not fit its class {type(model).__name__}: missing {missing[:3]}, "
            f"left over {left_over[:3]}, other shape {wrong[:3]}; this architecture is not supported yet"
        )
    return Check("structure", "passed", f"{len(written)} tensors as {type(model).__name__} wants them")


def _check_numeric(source: Path, cut: Path, plan: PrunePlan, check: str, trust_remote_code: bool) -> Check:
    """Level `numeric`: reloaded logits equal the untouched original's with the removed blocks made the identity."""
    import psutil
    import torch

    size = sum(p.stat().st_size for p in source.glob("*.safetensors"))
    if check == "structure":
        return Check("numeric", "not run: prune.check is structure")
    if check == "auto" and size > psutil.virtual_memory().available / 2:
        return Check("numeric", f"not run: the original ({size / 1e9:.1f} GB) does not fit in half of the free memory")
    original = models.load(source, "float32", trust_remote_code)
    vocabulary = original.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (2, 24), generator=generator).to(original.device)  # [B, T]
    expected = _with_identity_blocks(original, plan, ids)
    del original  # two models are never held at once
    pruned = models.load(cut, "float32", trust_remote_code)
    with torch.inference_mode():
        got = pruned(input_ids=ids, use_cache=False).logits.float()  # [B, T, V]
    off = (got - expected).abs().max().item()
    scale = max(1.0, expected.abs().max().item())
    if not off <= 1e-4 * scale:
        raise HfsdError(
            f"self-check failed: logits of the cut model are off by {off:.3g}; its blocks depend on their index"
        )
    _check_cache(pruned, ids)
    return Check("numeric", "passed", f"largest difference in logits {off:.2g}; cached generation equals uncached")


def _with_identity_blocks(model: PreTrainedModel, plan: PrunePlan, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the untouched model in which each removed block hands its input on. Nothing is renumbered; no cache."""
    import torch

    def identity(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        return (stream, *output[1:]) if isinstance(output, tuple) else stream

    _, blocks = models.decoder_blocks(model)
    hooks = [blocks[i].register_forward_hook(identity, with_kwargs=True) for i in plan.removed]
    try:
        with torch.inference_mode():
            return model(input_ids=ids, use_cache=False).logits.float()  # [B, T, V]
    finally:
        for hook in hooks:
            hook.remove()


def _check_cache(model: PreTrainedModel, ids: torch.Tensor) -> None:
    """Greedy generation with the cache must equal generation without it, token for token."""
    import torch

    def greedy(use_cache: bool) -> torch.Tensor:
        return model.generate(
            ids[:1, :8], max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=use_cache, pad_token_id=0
        )

    with torch.inference_mode():
        if not torch.equal(greedy(True), greedy(False)):
            raise HfsdError("self-check failed: generation with a cache differs from generation without one")
