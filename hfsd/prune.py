"""Prune: a stock checkpoint without some of its blocks, by copying tensor bytes, and its self-check."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hfsd import cost, models, selfcheck, shards, surgery
from hfsd.errors import BadRequest, HfsdError
from hfsd.models import PROVENANCE
from hfsd.plain import dumps
from hfsd.records import Check, Checkpoint, Cut, ModelRef, Provenance, PrunePlan
from hfsd.rundir import link_or_copy, new_folder, write_atomic

SHARD_BYTES = 5 * 10**9
# What travels as it is: generation config, chat template, tokenizer, code. Weights of any format would be the uncut
# model's; config and hfsd.json are written anew, and the source's card is not the cut's.
TRAVELS = re.compile(r"\.(json|txt|model|jinja|py|tiktoken)$")
WRITTEN_ANEW = re.compile(r"\.index\.json$|^config\.json$|^hfsd\.json$")


def run(
    source: Path,
    ref: ModelRef,
    plan: PrunePlan,
    out: Path,
    check: str = "auto",
    trust_remote_code: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Checkpoint:
    """Writes the cut checkpoint to a new folder `out` and checks it before the folder gets its name.

    Args:
        source: a folder with config.json and safetensors.
        ref: what the source is, for the provenance in hfsd.json.
        plan: which blocks stay; all of them is a copy.
        check: `structure`, `numeric`, or `auto` (numeric where the original fits in half of the free memory).
        shard_bytes: largest file.

    Raises:
        Refusal: the architecture cannot be cut soundly there.
        HfsdError: the checkpoint is corrupt, the disk is full, or the self-check failed; nothing is left behind.
    """
    if check not in ("auto", "structure", "numeric"):
        raise BadRequest(f"check: {check!r} is none of auto, structure, numeric")
    models.check_folder(source)
    config = surgery.described(source, trust_remote_code) if plan.removed else models.config_dict(source)
    if plan.n_layers != models.depth(source):
        raise BadRequest(f"the plan is for {plan.n_layers} blocks, and {source} has {models.depth(source)}")
    surgery.refuse_unsound(config, plan.kept, plan.n_layers)
    new_config = surgery.cut_config(config, plan.kept, plan.n_layers)
    seconds: dict[str, float] = {}
    with _timed(seconds, "copy"):
        tensors = shards.read(source)
        prefix = surgery.stack_prefix((t.name for t in tensors), config, plan.n_layers)
        kept = [(new, t) for t in tensors if (new := surgery.cut_name(t.name, prefix, plan)) is not None]
        _check_space(out, sum(t.bytes for _, t in kept))
    with new_folder(out) as target:
        with _timed(seconds, "copy"):
            for path in sorted(source.iterdir()):
                if path.is_file() and TRAVELS.search(path.name) and not WRITTEN_ANEW.search(path.name):
                    shutil.copy2(path, target / path.name)
            write_atomic(target / "config.json", json.dumps(new_config, indent=2, sort_keys=True) + "\n")
            write_atomic(target / PROVENANCE, dumps(_provenance(source, ref, plan)))
            shards.write(kept, target, shard_bytes)
        checks = _checked(source, target, plan, check, trust_remote_code, seconds)
    return _record(tensors, config, out, plan, checks, seconds)


def adopt(source: Path, cut: Path, out: Path, check: str = "auto", trust_remote_code: bool = False) -> Checkpoint:
    """Takes a pruned checkpoint that the user already has: hard-linked or copied, checked against the original.

    Raises:
        BadRequest: its hfsd.json, which says which blocks it keeps, is missing.
    """
    models.check_folder(cut)
    made = models.provenance(cut)
    if made is None:
        raise BadRequest(
            f"prune.from: {cut} has no {PROVENANCE}, so which blocks it keeps is unknown; cut it with `hfsd prune`"
        )
    why = "; ".join(c.why for c in made.cuts)
    plan = PrunePlan(made.n_layers, made.kept, why, made.cuts[-1].scores if made.cuts else {})
    if plan.n_layers != models.depth(source):
        raise BadRequest(
            f"prune.from: {cut} was cut from {plan.n_layers} blocks, this original has {models.depth(source)}"
        )
    seconds: dict[str, float] = {}
    with new_folder(out) as target:
        with _timed(seconds, "copy"):
            for path in sorted(p for p in cut.iterdir() if p.is_file()):
                link_or_copy(path, target / path.name)
        checks = _checked(source, target, plan, check, trust_remote_code, seconds)
    return _record(shards.read(source), models.config_dict(source), out, plan, checks, seconds)


def _checked(
    source: Path, target: Path, plan: PrunePlan, check: str, trust_remote_code: bool, seconds: dict[str, float]
) -> list[Check]:
    with _timed(seconds, "structure"):
        structure = selfcheck.structure(target, trust_remote_code)
    with _timed(seconds, "numeric"):
        return [structure, selfcheck.numeric(source, target, plan, check, trust_remote_code)]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(seconds.get(name, 0.0) + time.perf_counter() - start, 3)


def _record(
    before: Sequence[shards.Tensor],
    config: dict[str, Any],
    out: Path,
    plan: PrunePlan,
    checks: list[Check],
    seconds: dict[str, float],
) -> Checkpoint:
    """What was written, beside the tensors and the config of the original."""
    prefix = surgery.stack_prefix((t.name for t in before), config, plan.n_layers)
    stack = [(t.name, t.shape) for t in before if t.name.startswith(f"{prefix}.")]
    removed = [(name, shape) for name, shape in stack if surgery.cut_name(name, prefix, plan) is None]
    whole = cost.matmul_weights(stack, config) + cost.head_weights(config)
    with _timed(seconds, "hash"):
        digests = shards.digests(out)
    return Checkpoint(
        path=out.name,
        sha256=digests,
        params=sum(t.numel for t in shards.read(out)),
        original_params=sum(t.numel for t in before),
        matmul_flop_cut=cost.matmul_weights(removed, config) / whole,
        plan=plan,
        checks=checks,
        seconds=seconds,
    )


def _provenance(source: Path, ref: ModelRef, plan: PrunePlan) -> Provenance:
    """Cutting a cut model: its blocks keep the numbers they had in the first original."""
    before = models.provenance(source) or Provenance(ref, plan.n_layers, tuple(range(plan.n_layers)), [])
    removed = tuple(before.kept[i] for i in plan.removed)
    cuts = [*before.cuts, Cut(removed, plan.why, plan.scores)] if removed else before.cuts
    return Provenance(before.original, before.n_layers, tuple(before.kept[i] for i in plan.kept), cuts)


def _check_space(out: Path, needed: int) -> None:
    there = next(p for p in out.absolute().parents if p.exists())
    free = shutil.disk_usage(there).free
    if free < needed * 1.01 + (64 << 20):
        raise HfsdError(
            f"{there} has {free / 1e9:.1f} GB free, the cut checkpoint needs {needed / 1e9:.1f} GB; free some space"
        )
