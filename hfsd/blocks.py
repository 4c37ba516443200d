"""What the blocks of a recipe share: their base, names, ranges and lists of blocks."""

from __future__ import annotations

import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")
VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
RANGE = re.compile(r"^(\d+):(\d+)$")

Positive = Annotated[int, Field(ge=1)]


class Block(BaseModel):
    """A block of a recipe: unknown keys are faults, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Endpoint(Block):
    url: str = Field(min_length=1, description="base URL of an OpenAI-compatible server, /v1 included")
    model: str | None = Field(None, description="name of the original on that server; None: model.path")
    api_key_env: str | None = Field(
        None,
        description="name of the environment variable that holds the server's key; None: no key, or for "
        "https://*.huggingface.co the Hub's token. The key itself never stands in a recipe",
    )
    concurrency: Positive = Field(32, description="requests in flight")
    timeout: float = Field(120.0, gt=0, description="seconds until a request is given up and tried again")
    retries: int = Field(5, ge=0, description="tries after the first one, with backoff, before the row is given up")

    @field_validator("api_key_env")
    @classmethod
    def _is_variable(cls, value: str | None) -> str | None:
        if value is not None and (not VARIABLE.match(value) or value.startswith("hf_")):
            raise ValueError("is the name of an environment variable, not the key that it holds")
        return value


def checked_name(value: str) -> str:
    if not NAME.match(value):
        raise ValueError(f"{value!r} must be lower-case letters, digits, '.', '_' and '-', at most 64 of them")
    return value


def distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) < len(value):
        raise ValueError(f"{list(value)} names one of them twice")
    return value


def as_range(text: str) -> tuple[int, int]:
    """`12:18` -> (12, 18)."""
    start, stop = text.split(":")
    return int(start), int(stop)


def checked_range(value: str) -> str:
    found = RANGE.match(value)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"{value!r} is no range START:STOP with START < STOP, such as 12:18")
    return value


def as_blocks(value: str) -> tuple[int, ...] | None:
    """`0,1,4:6` -> (0, 1, 4, 5); None where that is no ascending list."""
    found: list[int] = []
    for part in value.replace(" ", "").split(","):
        if RANGE.match(part):
            found += range(*as_range(part))
        elif part.isdecimal():
            found.append(int(part))
        else:
            return None
    return tuple(found) if found and found == sorted(set(found)) else None


def slug(text: str) -> str:
    """Lower case, with runs of anything but letters, digits and dots as one hyphen."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.") or "unnamed"
