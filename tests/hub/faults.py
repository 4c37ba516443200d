"""Faults on demand: which request goes wrong next, and how. `LoopbackHub.fault` is the way in."""

import re
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

KINDS = ("status", "slow", "cut", "reset", "lost", "corrupt")


@dataclass
class Fault:
    """One planned fault. `hits` counts the requests that met it."""

    method: str  # or "*"
    path: str  # regular expression, searched in the request's target as sent (percent-encoded, with its query)
    kind: str
    times: int | None = 1  # None: for good
    skip: int = 0  # requests that fit and are let through first
    status: int = 500
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0
    hits: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"a fault is one of {', '.join(KINDS)}, not {self.kind!r}")

    def fits(self, method: str, target: str) -> bool:
        """Whether this request meets the fault; counts it."""
        if self.method not in ("*", method) or not re.search(self.path, target):
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.hits += 1
        return True


class Plan:
    """The faults of one server, in the order in which they were asked for."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        with self._lock:
            self._faults.append(fault)
        return fault

    def clear(self) -> None:
        with self._lock:
            self._faults.clear()

    def take(self, method: str, target: str) -> Fault | None:
        """The first fault that fits a request; it is used up by one."""
        with self._lock:
            return next((fault for fault in self._faults if fault.fits(method, target)), None)


def flipped(content: bytes) -> bytes:
    """The same number of bytes, the middle one changed."""
    middle = len(content) // 2
    return content[:middle] + bytes(byte ^ 0xFF for byte in content[middle : middle + 1]) + content[middle + 1 :]


def damage(files: Iterable[Path]) -> None:
    """Changes one byte of each file in place."""
    for file in files:
        file.write_bytes(flipped(file.read_bytes()))
