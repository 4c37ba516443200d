"""A recipe: one block per stage. Shape only, no torch; facts (depth, tasks, files) are checked by `pipeline.preflight`.

The help text of a field stands beside it and states the unit; `None` means derived, and the run prints what it derived.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from hfsd.blocks import Block, Endpoint, Positive, checked_name, slug
from hfsd.blocks_cut import Data, Model, Prune, Scan
from hfsd.blocks_recovery import Merge, Rewrite, Train
from hfsd.errors import nearest


class TaskFiles(Block):
    test: str = Field(description="a .jsonl/.json/.csv/.parquet file with the columns of the task's own data set")
    fewshot: str | None = Field(
        None, description="a file of shots; None: rows of `test` that are not evaluated, and no score for a leaderboard"
    )


class Evaluate(Block):
    tasks: tuple[str, ...] = Field(
        ("demo",), min_length=1, description="suites (demo, quick, openllm) or any lm-eval task or group"
    )
    data: dict[str, TaskFiles] = Field(
        default_factory=dict, description="local files in the place of a task's data, by the task's name"
    )
    limit: Positive | None = Field(None, description="documents per task; None: all (of gsm8k in `quick`: 100)")
    shots: int | None = Field(None, ge=0, description="few-shot examples; None: the task's or the suite's own number")
    seed: int = Field(0, description="seed of the few-shot draw, and of what a task shuffles")
    fewshot: Literal["drawn", "fixed"] = Field(
        "drawn", description="drawn: by the task's own sampler; fixed: the same shots for every question, much faster"
    )
    chat_template: bool | None = Field(None, description="ask in the chat template; None: where the tokenizer has one")
    multiturn: bool | None = Field(None, description="shots as turns of the chat; None: with a chat template")
    engine: Literal["transformers", "vllm", "endpoint"] = Field(
        "transformers",
        description="transformers: in this process, on one set of weights; vllm: in this process, where vLLM is "
        "installed; endpoint: servers with /v1/completions, such as vLLM's",
    )
    tensor_parallel: Positive = Field(1, description="accelerators that share each layer, for engine: vllm")
    endpoint: dict[str, Endpoint] = Field(
        default_factory=dict, description="the server of each variant, by its id, for engine: endpoint"
    )
    batch_tokens: Positive = Field(2048, description="tokens per batch, padding included")

    @model_validator(mode="after")
    def _fits(self) -> Evaluate:
        if (self.engine == "endpoint") != bool(self.endpoint):
            raise ValueError("engine: endpoint and the block evaluate.endpoint go together; give both or neither")
        if self.multiturn and self.chat_template is False:
            raise ValueError("multiturn puts shots into turns of a chat, and chat_template is off; change one of them")
        return self


class Compare(Block):
    prompts: Positive = Field(32, description="held-out prompts on which shift and draft use are measured")
    max_new_tokens: Positive = Field(256, description="tokens of each answer")
    temperature: float = Field(1.0, gt=0, description="of the original's sampled answers")
    seed: int = Field(0, description="seed of the original's sampled answers")
    similarity_model: str | None = Field(
        None, description="a sentence-transformers model that measures similarity; None: overlap of words (ROUGE-1)"
    )


class Publish(Block):
    to: str = Field("folder", description="'folder': the files of each repo under publish/; else a Hub namespace")
    private: bool = False
    prefix: str | None = Field(None, description="start of every repo name; None: the model's short name")
    names: str = Field(
        "{prefix}-pruned{n}", description="start of the names of cut models and Space; {n}: how many blocks are removed"
    )
    adapter: Literal["subfolder", "repo"] = Field(
        "subfolder", description="subfolder: an adapter lies beside its merged model; repo: in a repo of its own"
    )

    @field_validator("names")
    @classmethod
    def _is_template(cls, value: str) -> str:
        if re.search(r"[{}]", value.replace("{prefix}", "").replace("{n}", "")):
            raise ValueError(f"{value!r}: the places that can be open are {{prefix}} and {{n}}")
        return value

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
        return checked_name(value)

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
