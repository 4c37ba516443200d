"""What a run writes to disk, step by step, from headers or a config; and the refusal of a run that would not fit.

Whole checkpoints count, the original among them where it is still to be fetched: what is small beside them (scores,
rewrites, pictures) does not. Nothing is guessed: a size that is not known is None, and never a reason to refuse.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hfsd import cost, fetch, models, settings, shards, surgery
from hfsd.errors import HfsdError
from hfsd.recipe import Recipe
from hfsd.units import plural, size

FLOAT = 4  # bytes of a float32
BLOCK = re.compile(r"\.(\d+)\.")


@dataclass(frozen=True)
class Sizes:
    """A checkpoint in bytes and in parameters, and each of its blocks.

    `absent` are the bytes that are still to be fetched into `folder`'s file system.
    """

    bytes: int
    params: int
    block_bytes: tuple[int, ...]
    block_params: tuple[int, ...]
    folder: Path
    absent: int = 0

    def kept(self, recipe: Recipe, least: bool) -> Sizes:
        """The cut checkpoint; where a scan chooses among unlike blocks, the least or the most that it can be."""
        depth = len(self.block_bytes)
        if recipe.prune.blocks is not None:
            order = sorted(range(depth), key=lambda i: self.block_bytes[i], reverse=least)
            gone = order[: recipe.prune.blocks]
        elif recipe.prune.from_ is not None:
            made = models.provenance(Path(recipe.prune.from_))
            gone = [i for i in range(depth) if made is not None and i not in made.kept]
        else:
            gone = list(surgery.plan_by_hand(depth, recipe.prune).removed)
        return replace(
            self,
            bytes=self.bytes - sum(self.block_bytes[i] for i in gone),
            params=self.params - sum(self.block_params[i] for i in gone),
        )


@dataclass(frozen=True)
class Need:
    """What a step leaves in the run, and what it needs beside that while it works, in bytes. None: not known."""

    step: str
    stays: int | None
    passes: int | None
    what: str


def sizes(recipe: Recipe) -> Sizes | None:
    """Sizes of the original: from its headers where it is here, else from its config; None: not known (quantised).

    Raises:
        BadRequest: there is no such model.
    """
    folder = fetch.config_folder(recipe.model)
    n_layers = models.depth(folder)
    if fetch.has_weights(folder):
        return _of_headers(folder, n_layers)
    if models.config_dict(folder).get("quantization_config"):
        return None
    config = models.load_config(folder, recipe.model.trust_remote_code)
    whole, blocks = cost.by_block(config, recipe.model.trust_remote_code)
    per_block = tuple(b.checkpoint_bytes for b in blocks), tuple(b.params for b in blocks)
    here = sum(p.stat().st_size for p in folder.glob("*.safetensors"))
    absent = max(0, whole.checkpoint_bytes - here)
    return Sizes(whole.checkpoint_bytes, whole.params, *per_block, folder, absent)


def needs(
    recipe: Recipe, original: Sizes | None, steps: Sequence[str], root: Path, adapter: int | None, least: bool = False
) -> list[Need]:
    """What each step needs.

    Args:
        steps: names of steps, such as `train/sft-gsm8k`.
        adapter: bytes of one arm's adapter; None: not known.
        least: what is certainly needed, rather than the most that can be.
    """
    cut = original.kept(recipe, least) if original else None
    return [_need(recipe, name, original, cut, root, adapter, least) for name in steps]


def fetching(original: Sizes | None) -> list[Need]:
    """What the fetch of the original needs, where the cache is; empty where nothing is to be fetched, or not known."""
    if original is None or not original.absent:
        return []
    return [Need("(fetch)", original.absent, 0, "the original, which is not here yet")]


def most(found: Sequence[Need]) -> int:
    """The most that is needed at a time, of what is known."""
    held, peak = 0, 0
    for need in found:
        held += need.stays or 0
        peak = max(peak, held + (need.passes or 0))
    return peak


def check(recipe: Recipe, root: Path, todo: Sequence[tuple[str, Path]]) -> None:
    """Refuses a run whose remaining steps need more than a file system has free: the run directory's, or the cache's.

    Args:
        todo: name and folder of each step that is still to be done. What a folder holds already is not asked for again:
            it is a part of what the step leaves, or is let go when the step ends.

    Raises:
        HfsdError: what is needed, what is free, where, and what to do.
    """
    if not todo:
        return
    original, run = sizes(recipe), standing(root)
    found = needs(recipe, original, [name for name, _ in todo], root, adapter=None, least=True)
    left = [replace(n, stays=(n.stays or 0) - _held(folder)) for n, (_, folder) in zip(found, todo, strict=True)]
    cached = fetching(original)
    if original is not None and same_disk(original.folder, root):
        _refuse(run, [*cached, *left])
    else:
        _refuse(run, left)
        if original is not None and cached:
            _refuse(original.folder, cached)


def _refuse(place: Path, found: Sequence[Need]) -> None:
    """Raises HfsdError where a file system has no room."""
    needed, left = most(found), free(place)
    if needed <= left:
        return
    parts = ", ".join(f"{n.step} {size(n.stays)}" for n in found if n.stays and n.stays > 0)
    hints = ["give --out on another disk"] if any(n.step != "(fetch)" for n in found) else []
    hints += ["train fewer arms or seeds"] if any(n.step.startswith("train/") for n in found) else []
    hints += ["keep the Hub's cache on another disk (HF_HOME)"] if any(n.step == "(fetch)" for n in found) else []
    raise HfsdError(
        f"{place} has {size(left)} free, and this run needs at least {size(needed)} there ({parts}); free some space, "
        f"or: {'; '.join(hints)}"
    )


def free(place: Path) -> int:
    """Free bytes of the file system of a folder."""
    return shutil.disk_usage(place).free


def standing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


def same_disk(one: Path, other: Path) -> bool:
    """Whether two paths lie in one file system; the second need not be there yet."""
    return one.exists() and one.resolve().stat().st_dev == standing(other).stat().st_dev


def _need(
    recipe: Recipe, name: str, original: Sizes | None, cut: Sizes | None, root: Path, adapter: int | None, least: bool
) -> Need:
    kind, _, variant = name.partition("/")
    if kind not in ("prune", "train", "merge", "publish"):
        return Need(name, 0, 0, "small")
    if original is None or cut is None:
        return Need(name, None, None, "not known: no weights are here, and the config says they are quantised")
    if kind == "prune":
        given = Path(recipe.prune.from_) if recipe.prune.from_ else None
        linked = given is not None and same_disk(given, root)
        return Need(name, 0 if linked else cut.bytes, 0, "hard links" if linked else "the cut checkpoint")
    if kind == "train":
        return _training(recipe, name, variant, cut, adapter, least)
    if kind == "merge":
        return Need(name, cut.bytes, 0, "the merged checkpoint")
    if same_disk(original.folder, root):
        return Need(name, 0, 0, "hard links")
    return Need(name, original.bytes, 0, "a copy of the original, which lies on another disk")


def _training(recipe: Recipe, name: str, variant: str, cut: Sizes, adapter: int | None, least: bool) -> Need:
    """The merged checkpoint and the adapter stay; TRL's checkpoints and its last weights are let go."""
    full = recipe.train.method == "full"
    trained = FLOAT * cut.params if full else adapter
    stays = cut.bytes if full else cut.bytes + (adapter or 0)
    what = "the merged checkpoint" if full else "the merged checkpoint and the adapter"
    if any(variant == arm or variant.startswith(f"{arm}-") for arm in recipe.train.adapter_from):
        return Need(name, stays, 0, what)
    if trained is None:
        return Need(name, stays, None if not least else 0, what)
    # a checkpoint holds what is trained and its two moments; the one that is being written is one more than are kept
    kept = 1 if least else _checkpoints(recipe)
    what += f"; on the way {plural(kept, 'checkpoint')} of the training"
    return Need(name, stays, kept * 3 * trained + trained, what)


def _checkpoints(recipe: Recipe) -> int:
    asked = {**settings.SFT, **recipe.train.sft}
    rows = max(d.rows for d in recipe.data)
    per_step = int(asked["per_device_train_batch_size"]) * int(asked["gradient_accumulation_steps"])
    steps = int(asked["max_steps"])
    if steps <= 0:
        steps = -(-round(float(asked["num_train_epochs"]) * rows) // per_step)
    return min(int(asked["save_total_limit"]) + 1, -(-steps // int(asked["save_steps"])))


def _of_headers(folder: Path, n_layers: int) -> Sizes:
    tensors = shards.read(folder)
    prefix = surgery.stack_prefix((t.name for t in tensors), models.config_dict(folder), n_layers)
    held, params = [0] * n_layers, [0] * n_layers
    for tensor in tensors:
        found = BLOCK.match(tensor.name, len(prefix)) if tensor.name.startswith(f"{prefix}.") else None
        if found and int(found[1]) < n_layers:
            held[int(found[1])] += tensor.bytes
            params[int(found[1])] += tensor.numel
    whole = sum(t.bytes for t in tensors), sum(t.numel for t in tensors)
    return Sizes(*whole, tuple(held), tuple(params), folder)


def _held(folder: Path) -> int:
    """Bytes of a step's folder so far that are there for it alone: a hard link is another folder's, too."""
    stats = [p.stat() for p in folder.rglob("*") if p.is_file()] if folder.is_dir() else []
    return sum(s.st_size for s in stats if s.st_nlink == 1)
