"""Blocks of a recipe: how the data are rewritten, the arms trained, and models merged."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hfsd.blocks import Block, Endpoint, Positive, distinct


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
        return distinct(value)

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
        return distinct(value)

    @field_validator("t")
    @classmethod
    def _are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if wrong := [t for t in value if not 0 <= t <= 1]:
            raise ValueError(f"{wrong[0]:g} is no share from 0 to 1")
        return value
