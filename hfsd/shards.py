"""Safetensors checkpoints as bytes: where each tensor lies, and new shards copied from old ones.

No tensor passes through torch: headers are rewritten, bytes are copied by the kernel or, where they would not keep
their place within a page, through a buffer of 1 MB. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hfsd.errors import BadRequest, HfsdError
from hfsd.rundir import sha256, write_atomic

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ALIGNMENT = 8  # bytes; the data of a file starts at a multiple of it
# The kernel cannot copy between these two files by itself: another file system, or one without the call.
NO_RANGE_COPY = {errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
PAGE = 4096  # the kernel's copy is fast, and shares extents where it can, between equal places of pages
CHUNK = 1 << 20  # writes that end at its multiples are fastest: the page cache then holds them in large pieces


@dataclass(frozen=True)
class Tensor:
    """One tensor's place in a safetensors file: bytes [start, stop) of the file. `dtype` is the format's own name."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def bytes(self) -> int:
        return self.stop - self.start

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def read(folder: Path) -> list[Tensor]:
    """Every tensor of a checkpoint, in the order of its bytes, from the headers of its files.

    Raises:
        BadRequest: the folder holds no safetensors checkpoint.
        HfsdError: a file is missing, corrupt or truncated, a tensor is in two files, or the index is wrong.
    """
    weight_map = _weight_map(folder)
    tensors = [t for name in sorted(set(weight_map.values())) for t in _header(folder / name)]
    if (folder / INDEX).is_file():
        _check_index(folder, weight_map, tensors)
    return tensors


def write(tensors: Sequence[tuple[str, Tensor]], folder: Path, shard_bytes: int) -> None:
    """Copies tensors under new names into `folder`: one file, or shards of at most `shard_bytes` with an index.

    A tensor larger than `shard_bytes` gets a file of its own. Nothing is flushed to the disk: a killed process loses
    nothing by that, and waiting for the disk would take several times as long as the copy.

    Args:
        tensors: (new name, source), written in this order.

    Raises:
        HfsdError: a source ended before its header said.
        OSError: the disk is full or read-only.
    """
    shards = _packed(tensors, shard_bytes)
    if len(shards) == 1:
        _write_file(shards[0], folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(shard, folder / file)
        weight_map |= {name: file for name, _ in shard}
    index = {"metadata": {"total_size": sum(t.bytes for _, t in tensors)}, "weight_map": weight_map}
    write_atomic(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every safetensors file; as many at a time as there are cores."""
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip([f.name for f in files], pool.map(sha256, files), strict=True))


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over tensors in the order of their names: each one's name, type, shape and bytes, in whatever file.

    Args:
        tensors: (name that counts, tensor).

    Raises:
        HfsdError: a file ended before its header said.
    """
    found = hashlib.sha256()
    buffer = memoryview(bytearray(CHUNK))
    for name, tensor in sorted(tensors, key=lambda t: t[0]):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        with open(tensor.file, "rb", buffering=0) as source:
            at = tensor.start
            while at < tensor.stop:
                read = os.preadv(source.fileno(), [buffer[: min(CHUNK, tensor.stop - at)]], at)
                if not read:
                    raise HfsdError(f"{tensor.file} ended {tensor.stop - at} bytes early; fetch the checkpoint again")
                found.update(buffer[:read])
                at += read
    return found.hexdigest()


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor -> file by the index; without one, the one file stands for all of its tensors."""
    if not (folder / INDEX).is_file():
        if not (folder / WEIGHTS).is_file():
            raise BadRequest(f"{folder}: neither {WEIGHTS} nor {INDEX}; give the folder of a transformers checkpoint")
        return {"": WEIGHTS}
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError("its weight_map is empty")
    except (ValueError, KeyError, TypeError) as error:
        raise HfsdError(f"{folder / INDEX} is no index of tensors: {error}; fetch the checkpoint again") from None
    if strange := sorted(f for f in weight_map.values() if Path(str(f)).name != f):
        raise HfsdError(f"{folder / INDEX} names the file {strange[0]!r}, which is outside of the folder; refused")
    return weight_map


def _check_index(folder: Path, weight_map: dict[str, str], tensors: Sequence[Tensor]) -> None:
    places: dict[str, str] = {}
    for tensor in tensors:
        if tensor.name in places:
            fault = f"tensor {tensor.name} is in {places[tensor.name]} and in {tensor.file.name}"
            raise HfsdError(f"{folder}: {fault}; fetch the checkpoint again")
        places[tensor.name] = tensor.file.name
    for name, file in sorted(weight_map.items()):
        if places.get(name) != file:
            fault = f"the index names {name} in {file}, which does not hold it"
            raise HfsdError(f"{folder}: {fault}; fetch the checkpoint again")


def _header(file: Path) -> list[Tensor]:
    """The tensors of one file by their place. The safetensors library itself checks header, sizes and offsets."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np"), open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            header = json.loads(handle.read(length))
    except FileNotFoundError:
        raise HfsdError(f"{file} is missing; fetch the checkpoint again") from None
    except (SafetensorError, ValueError) as error:
        raise HfsdError(f"{file} is corrupt or truncated: {error}; fetch the checkpoint again") from None
    header.pop("__metadata__", None)
    begin = 8 + length
    found = [
        Tensor(n, file, v["dtype"], tuple(v["shape"]), *(begin + at for at in v["data_offsets"]))
        for n, v in header.items()
    ]
    return sorted(found, key=lambda t: (t.start, t.stop))


def _packed(tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> list[list[tuple[str, Tensor]]]:
    shards: list[list[tuple[str, Tensor]]] = [[]]
    filled = 0
    for name, tensor in tensors:
        if shards[-1] and filled + tensor.bytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, tensor))
        filled += tensor.bytes
    return shards


def _write_file(tensors: Sequence[tuple[str, Tensor]], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors:
        stop = offset + tensor.bytes
        header[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [offset, stop]}
        offset = stop
    runs = _runs([t for _, t in tensors])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * _padding(8 + len(text), runs[0][1] if runs else 0)
    with open(path, "wb", buffering=0) as target:
        _write_all(target, len(text).to_bytes(8, "little") + text)
        for file, start, stop in runs:
            with open(file, "rb", buffering=0) as source:
                _copy(source, start, stop, target)


def _padding(size: int, first: int) -> int:
    """Spaces behind a header that would be `size` bytes long, so that its data lies in pages as its source does."""
    return (first - size) % PAGE if first % ALIGNMENT == 0 else -size % ALIGNMENT


def _runs(tensors: Sequence[Tensor]) -> list[tuple[Path, int, int]]:
    """Neighbours that stay neighbours are one copy: the kept blocks of a file are usually two runs, not hundreds."""
    runs: list[tuple[Path, int, int]] = []
    for tensor in tensors:
        if runs and runs[-1][0] == tensor.file and runs[-1][2] == tensor.start:
            runs[-1] = (tensor.file, runs[-1][1], tensor.stop)
        elif tensor.bytes:
            runs.append((tensor.file, tensor.start, tensor.stop))
    return runs


def _copy(source: IO[bytes], start: int, stop: int, target: IO[bytes]) -> None:
    """Appends bytes [start, stop) of a file to another.

    By the kernel's `copy_file_range` where both lie at the same place of a page, else, and where the kernel cannot,
    through a small buffer: on ext4 the kernel's copy between unequal places took 1.6 times as long as `cp`.
    """
    at = target.tell()
    by_kernel = (start - at) % PAGE == 0
    buffer = memoryview(bytearray(CHUNK))
    while start < stop:
        moved = 0
        if by_kernel and at % CHUNK == 0:
            try:
                moved = os.copy_file_range(source.fileno(), target.fileno(), stop - start, offset_src=start)
            except OSError as error:
                if error.errno not in NO_RANGE_COPY:
                    raise
                by_kernel = False
                continue
        else:
            piece = buffer[: min(stop - start, CHUNK - at % CHUNK)]
            moved = os.preadv(source.fileno(), [piece], start)
            _write_all(target, piece[:moved])
        if not moved:
            raise HfsdError(f"{source.name} ended {stop - start} bytes early; fetch the checkpoint again")
        start, at = start + moved, at + moved


def _write_all(target: IO[bytes], data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[target.write(view) :]
