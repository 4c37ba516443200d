"""Frozen records that cross stages; `plain` writes them as JSON and reads them back.

Block ranges are 0-based and half-open everywhere. Seconds are wall time; bytes are bytes; losses are nats per token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SCHEMA = 1
STAGES = ("scan", "prune", "rewrite", "train", "merge", "evaluate", "compare", "report", "publish")

# One order of variants everywhere: tables, pictures, cards, the Space.
ARMS = ("original", "pruned", "sft", "self-distilled", "sdd+kd", "on-policy", "merged")
# Trained arm -> the text that it is trained on: a configuration of the rewritten data set, named as its parquet file.
TEXTS = {
    "sft": "reference",
    "self-distilled": "self-distilled",
    "sdd+kd": "self-distilled",
    "on-policy": "self-distilled",
}
TRAINED_ARMS = tuple(TEXTS)
TAUGHT = ("sdd+kd", "on-policy")  # arms that learn from the original itself, by another loss than fine-tuning
CONFIGS = ("reference", "self-distilled")


@dataclass(frozen=True)
class ModelRef:
    """Where a model came from. `revision` is a Hub commit, or `sha256:...` of the one file it was read from."""

    repo: str
    revision: str | None = None


Message = dict[str, str]  # a turn of a conversation: role and content


@dataclass(frozen=True)
class Example:
    """One answer of a fine-tuning set.

    `group` names what must not straddle a split (a template, a conversation), if anything. `history` are the turns
    before `prompt`. `answer` is the final answer, where the set states it apart from the reference.
    """

    id: str
    prompt: str
    reference: str
    group: str = ""
    history: tuple[Message, ...] = ()
    answer: str = ""


@dataclass(frozen=True)
class BlockScores:
    """d(start, width) for every range of blocks: `values[width][start]`, lower is more alike (safer to remove)."""

    metric: str
    tokens: str
    samples: int
    n_tokens: int
    values: dict[int, list[float]]


@dataclass(frozen=True)
class Candidate:
    """One cut that was verified: mean next-token loss on held-out calibration text without the blocks `removed`."""

    removed: tuple[int, ...]
    loss: float
    proposed_by: str

    @property
    def blocks(self) -> str:
        return spelled(self.removed)


@dataclass(frozen=True)
class PrunePlan:
    """Which blocks stay. `kept` are indices in the model that is cut; a range is the common case.

    `scores` are what the choice rests on (`loss`, `original_loss`, `angular_all`, ...); a cut by hand has none.
    """

    n_layers: int
    kept: tuple[int, ...]
    why: str
    scores: dict[str, float] = field(default_factory=dict)

    @property
    def removed(self) -> tuple[int, ...]:
        kept = set(self.kept)
        return tuple(i for i in range(self.n_layers) if i not in kept)

    @property
    def sentence(self) -> str:
        """`removes blocks [12, 18) of 30, counted from 0 (first removed 12, last removed 17); keeps 24`."""
        gone = self.removed
        if not gone:
            return f"removes no block of {self.n_layers}; keeps {self.n_layers}"
        return (
            f"removes blocks {spelled(gone)} of {self.n_layers}, counted from 0 "
            f"(first removed {gone[0]}, last removed {gone[-1]}); keeps {len(self.kept)}"
        )


@dataclass(frozen=True)
class Scan:
    """What the scan stage found: scores under both token choices, verified candidates, the plan, and its cost."""

    scores: dict[str, BlockScores]
    candidates: list[Candidate]
    original_loss: float
    plan: PrunePlan
    model: ModelRef
    seconds: float


@dataclass(frozen=True)
class Check:
    """One level of the self-check of a pruned checkpoint. `result` is `passed` or `not run: <why>`."""

    level: str
    result: str
    detail: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A pruned stock checkpoint on disk. `path` is relative to its stage's folder; sha256 per safetensors file.

    `params` and `original_params` count tied weights once. `matmul_flop_cut` is the share of the matrix-multiplication
    FLOPs per token that the cut saves: weights of the removed blocks over weights of all blocks and the output head.
    `seconds` are told apart: `copy`, `structure`, `numeric`, `hash`.
    """

    path: str
    sha256: dict[str, str]
    params: int
    original_params: int
    matmul_flop_cut: float
    plan: PrunePlan
    checks: list[Check]
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """One cut in a checkpoint's history: blocks removed, in the first original's numbering, and what it rests on."""

    removed: tuple[int, ...]
    why: str
    scores: dict[str, float]


@dataclass(frozen=True)
class Provenance:
    """`hfsd.json` in a pruned checkpoint: whose blocks these are. `kept` counts in the original's numbering.

    Cutting a cut model adds to `cuts`, oldest first.
    """

    original: ModelRef
    n_layers: int
    kept: tuple[int, ...]
    cuts: list[Cut]


@dataclass(frozen=True)
class Rewrite:
    """The original's answer to one row, and whether training uses it (`kept`) or the reference (`reason` says why).

    `n_tokens` counts generated tokens, the end-of-turn token included; `text` is always what was generated. `nats` and
    `reference_nats` are the losses per token of rewrite and reference under the original, given the prompt alone; None:
    not measured. `similarity` is that of the two, 0 to 1.
    """

    id: str
    text: str
    kept: bool
    reason: str
    n_tokens: int
    finish: str
    mode: str = "reference"
    nats: float | None = None
    reference_nats: float | None = None
    similarity: float = 0.0


@dataclass(frozen=True)
class TrainSet:
    """The rewritten set: `reasons` counts rows by reason; `kept` is the reason of a row that was accepted.

    `rows` were rewritten; `used` of them are trained on (None, in an older record: all). `n_tokens` are all tokens
    generated, drafts that were not chosen included; `seconds` is the time of generating and scoring them, and
    `tokens_per_second` their quotient. `length_change` is characters of all rewrites over those of their references,
    less 1. `modes` counts accepted rows by mode. `asked` is what the original was asked, with the places of prompt and
    reference open; the prompt alone is no asking. `reference_nats` and `rewrite_nats` are means over rows.
    """

    path: str
    rows: int
    kept_fraction: float
    reasons: dict[str, int]
    n_tokens: int
    seconds: float
    engine: str
    sampling: dict[str, Any]
    reference_chars: int
    rewrite_chars: int
    mode: str = "reference"
    modes: dict[str, int] = field(default_factory=dict)
    on_reject: str = "reference"
    asked: tuple[Message, ...] = ()
    reference_nats: float | None = None
    rewrite_nats: float | None = None
    similarity: float | None = None
    used: int | None = None
    tokens_per_second: float | None = None
    length_change: float | None = None

    @property
    def trained_rows(self) -> int:
        """Rows that are trained on: fewer than were rewritten where rejected ones were dropped."""
        return self.rows if self.used is None else self.used


@dataclass(frozen=True)
class Variant:
    """An arm with its data set and seed. The id is `ARM[-DATA][-sSEED]`."""

    arm: str
    data: str | None = None
    seed: int | None = None

    @property
    def id(self) -> str:
        parts = [self.arm, self.data, None if self.seed is None else f"s{self.seed}"]
        return "-".join(p for p in parts if p)


@dataclass(frozen=True)
class TrainReport:
    """How one arm was trained. `tokens` counts trained completion tokens; `losses` is (optimizer step, loss) pairs.

    `adapter` is None where every weight was trained. `fairness` hashes what the arms of one data set and seed must
    share: initial weights, row ids in order, steps or tokens, and hyperparameters. `engine` says what really ran, such
    as `DDP over 2 processes (gloo)`. `seconds` is all of it, `train_seconds` the steps alone; both are those of the
    process that finished it.
    """

    variant: Variant
    adapter: str | None
    merged: str
    rows: int
    steps: int
    tokens: int
    losses: list[list[float]]
    seconds: float
    peak_bytes: int
    trained_params: int
    hyperparameters: dict[str, Any]
    fairness: dict[str, str]
    method: str = "lora"
    engine: str = "1 process"
    train_seconds: float = 0.0


@dataclass(frozen=True)
class MergeLoss:
    """Held-out loss of one merge that was tried."""

    t: float | None
    loss: float


@dataclass(frozen=True)
class MergeReport:
    """Models merged into one. `t` is the share of the second of two: 0 gives the first, 1 the second.

    `t` is None where the method takes none. `losses` are in the order tried; the least was kept. `linear_tensors` and
    `linear_params` are the shares of tensors and of parameters on which SLERP fell back to linear interpolation, for
    being nearly parallel; None: the method is not slerp. `peak_bytes` is the process's so far.
    """

    method: str
    t: float | None
    parts: tuple[str, ...]
    base: str | None
    parameters: dict[str, Any]
    losses: list[MergeLoss]
    linear_tensors: float | None
    linear_params: float | None
    seconds: float
    peak_bytes: int
    mergekit: str

    @property
    def sentence(self) -> str:
        """What was merged, how, at which losses, and how much of it was linear."""
        said = [f"merged {' and '.join(self.parts)} by {self.method}{'' if self.t is None else f', t {self.t:g}'}"]
        if self.losses:
            scores = ", ".join(f"{m.loss:.4f}{'' if m.t is None else f' at t {m.t:g}'}" for m in self.losses)
            said.append(f"held-out loss in nats per token: {scores}")
        if self.linear_tensors is not None and self.linear_params is not None:
            said.append(
                f"SLERP fell back to linear on {self.linear_tensors:.1%} of tensors "
                f"({self.linear_params:.1%} of parameters)"
            )
        return "; ".join(said)


@dataclass(frozen=True)
class Receipt:
    """One published repo: `commit` is the Hub's, or the tree's sha256 where `repo` is a folder.

    `revision` is the branch, or `refs/pr/N` of a pull request. Of a collection, `repo` is the slug, and `commit` the
    sha256 of what it holds.
    """

    repo: str
    kind: str
    commit: str
    url: str
    files: dict[str, str] = field(default_factory=dict)
    revision: str = "main"


def spelled(blocks: tuple[int, ...]) -> str:
    """`[12, 18)` for a range of blocks, `{3, 7, 8}` for any other set."""
    if blocks and blocks == tuple(range(blocks[0], blocks[-1] + 1)):
        return f"[{blocks[0]}, {blocks[-1] + 1})"
    return "{" + ", ".join(map(str, blocks)) + "}"
