"""A recipe: one block per stage. Shape only, no torch; facts (depth, tasks, files) are checked by `pipeline.preflight`.

The help text of a field stands beside it and states the unit; `None` means derived, and the run prints what it derived.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field, field_validator, model_validator

from hfsd.errors import nearest

NAME = re.compile(r"^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$")
VARIABLE = re.compile(r"^[A-Za-z_][A-Za-z0-9_]*$")
RANGE = re.compile(r"^(\d+):(\d+)$")

Positive = Annotated[int, Field(ge=1)]


class Block(BaseModel):
    """A block of a recipe: unknown keys are faults, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


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
        return None if value is None else _name(value)

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
        return None if value is None else _checked_range(value)

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
        return None if value is None else _checked_range(value)

    @field_validator("keep")
    @classmethod
    def _are_blocks(cls, value: str | None) -> str | None:
        if value is not None and not (_blocks(value)):
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
        return _blocks(self.keep) if self.keep else None


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


class Rewrite(Block):
    from_: str | None = Field(None, alias="from", description="rewrites that you already have: .jsonl with id and text")
    task: Literal["instruction", "math", "code"] = Field("instruction", description="which prompt and which check")
    mode: Literal["reference", "few-shot", "self", "best"] | None = Field(
        None,
        description="reference: answer with the reference as a guide (the paper); few-shot: the same behind worked "
        "rewrites; self: the prompt alone; best: all three, and the acceptable one that is likeliest per token; "
        "None: best, or reference behind an endpoint, which tells no likelihoods",
    )
    prompts: str | None = Field(
        None,
        description="a YAML file of your own prompts, leak phrases and headings, of the shape of hfsd/prompts.yaml, "
        "whose keys it replaces; None: those",
    )
    candidates: Positive = Field(
        1, description="drafts per row, until one is accepted; more than 1 needs a temperature"
    )
    check: Literal["auto", "math", "exact", "choice", "json", "none"] = Field(
        "auto", description="of the final answer; auto: by the task (math; for code the tool calls, if there are any)"
    )
    on_reject: Literal["reference", "drop"] = Field(
        "reference", description="a row whose drafts are not acceptable keeps its reference, or leaves both arms"
    )
    max_growth: float | None = Field(
        3.0,
        gt=0,
        description="longest rewrite, in characters of its reference (200 more are always allowed); None: any",
    )
    min_similarity: float = Field(0.1, ge=0, le=1, description="least similarity to the reference")
    likelier: bool = Field(True, description="a rewrite must be at least as likely per token as its reference")
    similarity_model: str | None = Field(
        None, description="a sentence-transformers model that measures similarity; None: overlap of words (ROUGE-1)"
    )
    engine: Literal["transformers", "endpoint", "vllm"] = Field(
        "transformers",
        description="transformers: in this process; vllm: in this process, where vLLM is installed; endpoint: any "
        "OpenAI-compatible server, such as `vllm serve --data-parallel-size N`",
    )
    tensor_parallel: Positive = Field(1, description="accelerators that share each layer, for engine: vllm")
    endpoint: Endpoint | None = Field(None, description="the server, for engine: endpoint")
    max_new_tokens: Positive = Field(512, description="tokens per rewrite; a longer one is cut off and not used")
    batch_rows: Positive = Field(32, description="rows per planned batch; a batch is the unit that is resumed")
    batch_tokens: Positive = Field(
        32768, description="tokens that the transformers engine computes at once, prompts and answers, padding included"
    )
    temperature: float = Field(0.0, ge=0, description="0: greedy")
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int = 0

    @model_validator(mode="after")
    def _endpoint_given(self) -> Rewrite:
        if (self.engine == "endpoint") != (self.endpoint is not None):
            raise ValueError("engine: endpoint and the block rewrite.endpoint go together; give both or neither")
        if self.candidates > 1 and self.temperature == 0:
            raise ValueError(f"candidates is {self.candidates}, and at temperature 0 all of them are the same text")
        if self.mode == "best" and self.engine == "endpoint":
            raise ValueError("mode: best compares likelihoods, which a chat endpoint does not give; use another mode")
        return self

    @property
    def how(self) -> str:
        """The mode, derived where none is given."""
        return self.mode or ("reference" if self.engine == "endpoint" else "best")


Arm = Literal["sft", "self-distilled", "sdd+kd", "on-policy"]


class Train(Block):
    arms: tuple[Arm, ...] = Field(
        ("sft", "self-distilled"),
        min_length=1,
        description="what is trained: sft on the references, self-distilled on the rewrites, sdd+kd on the rewrites "
        "towards the original's distribution, on-policy on the pruned model's own answers, scored by the original",
    )
    adapter_from: dict[str, str] = Field(
        default_factory=dict, description="an adapter folder per arm that you already have; that arm is not trained"
    )
    method: Literal["lora", "dora", "qlora", "full"] = Field(
        "lora", description="qlora: on a 4-bit copy of the pruned model (extra qlora); full: every weight"
    )
    lora: dict[str, Any] = Field(
        default_factory=dict,
        description="any field of peft.LoraConfig; and scope: all (the default), or after-cut: only blocks behind the "
        "cut, so that the backward pass ends there",
    )
    sft: dict[str, Any] = Field(
        default_factory=dict, description="any field of trl.SFTConfig, for every arm whose trainer has it"
    )
    kd: dict[str, Any] = Field(
        default_factory=dict, description="more fields for sdd+kd: what TRL's GKDConfig has beside SFTConfig's"
    )
    on_policy: dict[str, Any] = Field(
        default_factory=dict,
        description="more fields for on-policy: what trl.DistillationConfig has beside SFTConfig's",
    )
    budget: Literal["rows", "tokens"] = Field(
        "rows",
        description="rows: every arm sees each row as often; tokens: as many trained completion tokens, to the nearest "
        "step",
    )
    seeds: tuple[int, ...] = Field(
        (0,),
        min_length=1,
        description="each trains every arm once more: its start, its order; several: mean and spread",
    )

    @field_validator("arms", "seeds")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return _distinct(value)

    @model_validator(mode="after")
    def _scope_fits(self) -> Train:
        if self.scope not in ("all", "after-cut"):
            raise ValueError(f"lora.scope is {self.scope!r}; it is all or after-cut")
        if self.method == "full" and self.lora:
            raise ValueError(
                f"method: full trains no adapter, but lora sets {', '.join(self.lora)}; remove one of them"
            )
        if self.budget == "tokens" and "on-policy" in self.arms:
            raise ValueError("budget: tokens counts a given text, and the arm on-policy makes its own; leave one out")
        if self.adapter_from and len(self.seeds) > 1:
            raise ValueError(f"adapter_from gives one adapter per arm, and seeds asks for {len(self.seeds)}")
        return self

    @property
    def scope(self) -> str:
        """Which blocks are adapted: `all`, or those behind the cut."""
        return str(self.lora.get("scope", "all"))


class Merge(Block):
    of: tuple[str, ...] = Field(min_length=2, description="names of the data sets whose models are merged, each once")
    arm: Arm = Field("self-distilled", description="the arm whose models are merged")
    method: str = Field("slerp", description="a merge method of mergekit, by its name there")
    t: tuple[float, ...] = Field(
        (0.5,),
        min_length=1,
        description="share of the second model, 0 to 1; of several the one with the least loss on rows kept for "
        "calibration is taken",
    )

    @field_validator("of", "t")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return _distinct(value)

    @field_validator("t")
    @classmethod
    def _are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [t for t in value if not 0 <= t <= 1]:
            raise ValueError(f"{wrong[0]:g} is no share from 0 to 1")
        return value


class Evaluate(Block):
    tasks: tuple[str, ...] = Field(
        ("demo",), min_length=1, description="suites (demo, openllm) or any lm-eval task or group"
    )
    limit: Positive | None = Field(None, description="documents per task; None: all")
    shots: int | None = Field(None, ge=0, description="few-shot examples; None: the task's own number")
    batch_tokens: Positive = Field(2048, description="tokens per batch, padding included")
    seed: int = 0


class Compare(Block):
    prompts: Positive = Field(32, description="held-out prompts on which the shift is measured")
    max_new_tokens: Positive = Field(256, description="tokens of each answer")


class Publish(Block):
    to: str = Field("folder", description="'folder': the files of each repo under publish/; else a Hub namespace")
    private: bool = False
    prefix: str | None = Field(None, description="start of every repo name; None: the model's short name")

    @field_validator("to")
    @classmethod
    def _is_namespace(cls, value: str) -> str:
        if not re.match(r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,95}$", value):
            raise ValueError(f"{value!r} is neither 'folder' nor a Hub namespace (letters, digits, - _ .)")
        return value


class Recipe(Block):
    """Everything a run is told. `hfsd recipe demo` prints a commented one."""

    name: str = Field(description="name of the run; its directory is runs/NAME")
    model: Model
    data: tuple[Data, ...] = Field(min_length=1, description="one data set, or a list of them: each trains every arm")
    scan: Scan = Scan()
    prune: Prune
    rewrite: Rewrite = Rewrite()
    train: Train = Train()
    merge: Merge | None = Field(None, description="models of several data sets merged into one more variant")
    evaluate: Evaluate = Evaluate()
    compare: Compare = Compare()
    publish: Publish = Publish()

    @field_validator("model", mode="before")
    @classmethod
    def _model_by_path(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _data_by_source(cls, value: Any) -> Any:
        sets = value if isinstance(value, list | tuple) else [value]
        return tuple({"source": one} if isinstance(one, str) else one for one in sets)

    @field_validator("name")
    @classmethod
    def _is_name(cls, value: str) -> str:
        return _name(value)

    @model_validator(mode="after")
    def _sets_fit(self) -> Recipe:
        names = [d.label for d in self.data]
        if len(set(names)) < len(names):
            raise ValueError(f"data: two sets are called {', '.join(names)}; give them names of their own (data.name)")
        if len(names) > 1 and self.rewrite.from_ is not None:
            raise ValueError("rewrite.from gives rewrites of one data set, and data lists several")
        if len(names) > 1 and self.train.adapter_from:
            raise ValueError("train.adapter_from gives one adapter per arm, and data lists several sets")
        if self.merge is not None:
            if unknown := [n for n in self.merge.of if n not in names]:
                raise ValueError(f"merge.of: no data set {unknown[0]!r}{nearest(unknown[0], names)}; there are {names}")
            if self.merge.arm not in self.train.arms:
                raise ValueError(f"merge.arm: {self.merge.arm} is not trained; train.arms has {list(self.train.arms)}")
        return self

    @property
    def model_name(self) -> str:
        """`smollm2-135m-instruct` for a package, Hub id, file or folder of that model."""
        return self.model.name or self.short(self.model.path)

    def rewrite_step(self, label: str) -> str:
        """The step, and the folder in the run, of a data set's rewrites: `rewrite`, or `rewrite/LABEL` of several."""
        return "rewrite" if len(self.data) == 1 else f"rewrite/{label}"

    @staticmethod
    def short(path: str) -> str:
        """The short name of a model from its Hub id, folder or file."""
        return slug(re.sub(r"(\.Q\d\w*|\.f16|\.f32)?\.gguf$", "", Path(path).name))


def _name(value: str) -> str:
    if not NAME.match(value):
        raise ValueError(f"{value!r} must be lower-case letters, digits, '.', '_' and '-', at most 64 of them")
    return value


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(value)) < len(value):
        raise ValueError(f"{list(value)} names one of them twice")
    return value


def as_range(text: str) -> tuple[int, int]:
    """`12:18` -> (12, 18)."""
    start, stop = text.split(":")
    return int(start), int(stop)


def _checked_range(value: str) -> str:
    found = RANGE.match(value)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"{value!r} is no range START:STOP with START < STOP, such as 12:18")
    return value


def _blocks(value: str) -> tuple[int, ...] | None:
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
