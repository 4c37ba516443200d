"""Blocks of a recipe: the model, its data, and how it is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import ByteSize, Field, field_validator, model_validator

from hfsd.blocks import Block, Positive, as_blocks, as_range, checked_name, checked_range, slug


class Model(Block):
    path: str = Field(
        min_length=1, description="Hub id, folder, *.gguf file, or package:DIST==VERSION/FILE (a file in a wheel)"
    )
    revision: str | None = Field(None, description="Hub commit, branch or tag; None: the default branch")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 on a device that has it, float32 on a CPU"
    )
    sha256: str | None = Field(None, description="pinned sha256 of a *.gguf file, checked before it is read")
    name: str | None = Field(None, description="short name used in repo names; None: from the path")
    license: str | None = Field(
        None, description="license of the original (an SPDX id of the Hub); None: from its card"
    )
    device_map: Literal["auto"] | None = Field(
        None, description="auto: spread the model over all devices, CPU and disk; None: one device"
    )
    trust_remote_code: bool = Field(False, description="run code that the model's repo brings; off unless you say so")


class Data(Block):
    source: str = Field(
        min_length=1, description="gym:NAME (reasoning-gym), a .jsonl/.json/.csv/.parquet file, or a Hub dataset id"
    )
    name: str | None = Field(None, description="short name used in variants and repo names; None: from the source")
    license: str | None = Field(None, description="license of the data set, for its card; None: not stated")
    config: str | None = Field(None, description="configuration of a Hub dataset")
    split: str = Field("train", description="split of a Hub dataset")
    revision: str | None = Field(None, description="commit of a Hub dataset")
    streaming: bool = Field(False, description="read only the first `pool` rows of a Hub dataset, without fetching all")
    prompt_column: str | None = Field(None, description="column with the prompt; None: detected")
    reference_column: str | None = Field(None, description="column with the reference answer; None: detected")
    rows: Positive = Field(1000, description="training rows, after the split")
    pool: Positive = Field(1000, description="rows drawn from gym:NAME, or streamed, before the split")
    held_out: float = Field(0.25, gt=0, lt=0.9, description="share of groups (templates) held out for evaluation")
    calibration: float = Field(0.15, gt=0, lt=0.9, description="share of groups (templates) kept for calibration")
    max_chars: Positive | None = Field(
        None, description="leave out rows whose prompt and reference are longer, in characters"
    )
    seed: int = Field(0, description="seed of generation, split and order")

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str | None) -> str | None:
        return None if value is None else checked_name(value)

    @model_validator(mode="after")
    def _something_left(self) -> Data:
        if self.held_out + self.calibration >= 1:
            raise ValueError(
                f"held_out + calibration is {self.held_out + self.calibration:g}: nothing is left to train on"
            )
        return self

    @property
    def label(self) -> str:
        """Its part of variant ids; without dots, since it names a torch module when adapters are loaded."""
        return (self.name or slug(Path(self.source.removeprefix("gym:")).stem)).replace(".", "-")


class Scan(Block):
    calibration: str | None = Field(
        None, description="calibration text: a source as in data.source, .txt too; None: rows of the data kept apart"
    )
    rows: Positive = Field(128, description="calibration sequences that are scored")
    verify_rows: Positive = Field(32, description="held-out calibration sequences on which candidates are verified")
    max_length: Positive = Field(512, description="tokens per calibration sequence")
    batch_tokens: Positive = Field(2048, description="tokens per batch, padding included")
    widths: str | None = Field(None, description="START:STOP, the widths to report, half-open; None: all")
    metric: Literal["angular", "bi"] = Field("angular", description="angular distance (the paper) or block influence")
    tokens: Literal["last", "all"] = Field("all", description="tokens averaged: text tokens, or each text's last one")
    select: Literal["verified", "lowest"] = Field(
        "verified",
        description="verified: least held-out loss among the best candidates; lowest: least score (the paper)",
    )
    search: Literal["contiguous", "greedy"] = Field(
        "contiguous", description="one range of blocks; or greedy: any blocks, one at a time by held-out loss (SLEB)"
    )
    candidates: Positive = Field(4, description="candidates verified per token choice, and by screening")
    screen_rows: int = Field(
        8, ge=0, description="held-out sequences on which every range is measured to find candidates; 0: no screening"
    )

    @field_validator("widths")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        return None if value is None else checked_range(value)

    @model_validator(mode="after")
    def _greedy_verifies(self) -> Scan:
        if self.search == "greedy" and self.select == "lowest":
            raise ValueError("search: greedy chooses by held-out loss; leave select at verified")
        return self


class Prune(Block):
    blocks: int | None = Field(
        None, ge=0, description="how many blocks to remove; the scan chooses which; 0: a copy, no scan"
    )
    remove: str | None = Field(None, description="START:STOP, 0-based and half-open, instead of a scan")
    keep: str | None = Field(None, description="blocks that stay, instead of a scan, such as 0,1,4:10")
    from_: str | None = Field(None, alias="from", description="a pruned checkpoint that you already have")
    check: Literal["auto", "structure", "numeric"] = Field(
        "auto", description="self-check; auto: numeric where the original fits in half of the free memory"
    )
    max_shard_size: ByteSize = Field(ByteSize(5 * 10**9), description="largest file of the checkpoint, such as 5GB")

    @field_validator("remove")
    @classmethod
    def _is_range(cls, value: str | None) -> str | None:
        return None if value is None else checked_range(value)

    @field_validator("keep")
    @classmethod
    def _are_blocks(cls, value: str | None) -> str | None:
        if value is not None and not (as_blocks(value)):
            raise ValueError(f"{value!r} is no list of blocks, each once and ascending, such as 0,1,4:10")
        return value

    @model_validator(mode="after")
    def _one_way(self) -> Prune:
        ways = {"blocks": self.blocks, "remove": self.remove, "keep": self.keep, "from": self.from_}
        given = [k for k, v in ways.items() if v is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(ways)}; got {' and '.join(given) or 'none'}")
        return self

    @property
    def range(self) -> tuple[int, int] | None:
        return as_range(self.remove) if self.remove else None

    @property
    def kept(self) -> tuple[int, ...] | None:
        return as_blocks(self.keep) if self.keep else None
