"""Frozen records of what measuring found: scores, distances, costs, and what a report says of them.

Losses and distances are nats per token; recoveries are percent; intervals are 95%; bytes are bytes; seconds wall time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hfsd.records import SCHEMA, MergeReport, ModelRef, PrunePlan, Scan, TrainReport, TrainSet, Variant

VERDICTS = ("better", "worse", "not told apart")


@dataclass(frozen=True)
class Estimate:
    """A number and the bounds of its 95% interval; None: no interval is known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Setup:
    """How a task was asked, beside its number of shots.

    `limit` is documents per task, None: all. `seed` draws the shots. `fewshot` is `drawn` (by the task's own sampler,
    most draw anew for every question) or `fixed` (the first of the pool, the same for all). `data` says which files
    stand in the place of the task's own, with the split; "" where they are its own. `comparable` is False where the
    score must not be set beside a leaderboard's. `truncated` is how many of the documents were longer than the model
    reads, so that the beginning of a text was left out.
    """

    limit: int | None = None
    seed: int = 0
    chat_template: bool = False
    multiturn: bool = False
    fewshot: str = "drawn"
    engine: str = "transformers"
    data: str = ""
    comparable: bool = True
    truncated: int = 0


@dataclass(frozen=True)
class EvalRow:
    """One number of lm-eval. `value` and `stderr` are in the task's own unit (a fraction for accuracies).

    `chance` is None where guessing has no meaning (bits per byte); `doc_file` holds each document's own result.
    `pooled` is False for a group that is the mean of its tasks' values whatever their sizes, and so of no documents.
    """

    variant: Variant
    task: str
    version: str
    metric: str
    filter: str
    shots: int
    value: float
    stderr: float | None
    n: int
    chance: float | None
    higher_is_better: bool
    doc_file: str
    setup: Setup = Setup()
    pooled: bool = True


@dataclass(frozen=True)
class Along:
    """Distance of a variant from the original, averaged over the tokens of one kind of text.

    `kl` is KL(original || variant) in nats; `top1` the share of tokens where both put the same one first; `overlap`
    is 1 - total variation, which is the probability that the original takes a token that the variant drafts (Leviathan
    et al. 2023, arXiv 2211.17192, corollary 3.6). Standard errors are over prompts, since the tokens of one text depend
    on one another, and None of a single prompt; `kls` are the means of each prompt's text.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    overlap: float
    overlap_stderr: float | None
    prompts: int
    n_tokens: int
    kls: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Shift:
    """How far a variant moved from the original on held-out prompts.

    Along the original's own sampled answers (what it would say), along its greedy ones, and along the references (what
    it would not). `similarities` are those of the greedy answers to the original's, 0 to 1, one per prompt;
    `similarity_by` is how they were measured: `ROUGE-1`, or an embedding model's name.
    """

    variant: Variant
    sampled: Along
    greedy: Along
    references: Along
    similarities: list[float]
    similarity_by: str


@dataclass(frozen=True)
class Draft:
    """A variant as the draft model of the original (speculative decoding).

    `acceptance` is the mean of 1 - total variation over `n_tokens` tokens of the original's sampled answers to
    `prompts` prompts (its standard error is over prompts, None of a single one), `greedy` the share of tokens of its
    greedy text that the variant puts first. `tokens_per_pass[gamma]` is the expected number of tokens per pass of the
    original with gamma drafted ones, (1 - a^(gamma + 1)) / (1 - a) (Leviathan et al. 2023, equation 1; it takes
    acceptances as independent). `speedup` is measured, with the least and the greatest prompt as bounds; `measured`
    says how. `refused` says why there is no draft use; the numbers are nought then.
    """

    variant: Variant
    acceptance: float
    acceptance_stderr: float | None
    greedy: float
    tokens_per_pass: dict[int, float]
    speedup: Estimate | None = None
    measured: str = ""
    refused: str = ""
    prompts: int = 0
    n_tokens: int = 0


@dataclass(frozen=True)
class Cost:
    """What running a model costs: `shape` is `original` or `pruned`, which its arms are too once they are merged.

    `matmul_flops` and `kv_bytes` are per token; `prefill` and `decode` tokens per second, with the least and greatest
    of the turns as bounds; `peak_bytes` the peak memory of a process that holds this model alone. `state_bytes` is what
    the cache holds at most that does not grow with the text (states, and windows once they are full). Both are in
    `dtype`, in which the model is loaded; None: not known, and `note` says why.
    """

    shape: str
    params: int
    matmul_flops: int
    kv_bytes: int | None
    checkpoint_bytes: int
    prefill: Estimate | None = None
    decode: Estimate | None = None
    peak_bytes: int | None = None
    measured: str = ""
    state_bytes: int | None = 0
    dtype: str = ""
    note: str = ""


@dataclass(frozen=True)
class Answer:
    """One held-out prompt answered greedily by every variant, for side-by-side reading. Keys are variant ids."""

    id: str
    prompt: str
    reference: str
    answers: dict[str, str]


@dataclass(frozen=True)
class TaskScore:
    """One variant on one task. `low` and `high` bound its own 95% interval, as if other documents had been asked.

    Recoveries are None where they are none (n/a); their intervals are of a paired bootstrap over documents.
    """

    value: float
    low: float | None
    high: float | None
    recovery: Estimate | None
    chance_corrected: Estimate | None


@dataclass(frozen=True)
class TaskSummary:
    """One task over all variants. `in_mean` is False where the original does not clear chance; `note` says why.

    `setup` is the original's; `remarks` say what else a reader has to know, such as a variant that was asked otherwise.
    """

    task: str
    metric: str
    n: int
    chance: float | None
    shots: int
    higher_is_better: bool
    in_mean: bool
    note: str
    scores: dict[str, TaskScore]
    filter: str = "none"
    version: str = ""
    setup: Setup = Setup()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Paired:
    """`first` less `second` over the same documents, in the task's own unit, with a paired bootstrap's 95% interval.

    `task` is None for the mean over the tasks that count; `n` is distinct documents. `p` is McNemar's exact two-sided
    one over the documents that one got right and the other did not; where documents are not simply right or wrong, and
    for a mean of several tasks, that of the randomisation test of which McNemar's is the special case (`hfsd.paired`).
    `verdict` is one of `VERDICTS`, of `first`: better or worse where the interval leaves zero out and p < 0.05.
    """

    first: str
    second: str
    task: str | None
    metric: str
    filter: str
    difference: Estimate
    p: float
    n: int
    verdict: str
    test: str = "McNemar"  # or `exchange`: what `p` is of


@dataclass(frozen=True)
class VariantSummary:
    """One line of the closing table, over the tasks that count; None where none does.

    `recovery` is the ratio of means (the paper's), `mean_of_ratios` the mean of the tasks' recoveries,
    `chance_corrected` the ratio of means after chance is taken from both.
    """

    variant: Variant
    params: int
    mean: Estimate | None
    recovery: Estimate | None
    mean_of_ratios: Estimate | None
    chance_corrected: Estimate | None
    shift: Shift | None
    train_seconds: float | None


@dataclass(frozen=True)
class Results:
    """`report/results.json`: everything the cards, the report and the Space say about a run.

    `scan` is None where the cut was given by hand.
    """

    name: str
    original: ModelRef
    original_params: int
    plan: PrunePlan
    scan: Scan | None
    variants: list[VariantSummary]
    tasks: list[TaskSummary]
    train_sets: dict[str, TrainSet]
    training: list[TrainReport]
    stage_seconds: dict[str, float]
    matmul_flop_cut: float
    param_cut: float
    recipe: str
    facts: dict[str, Any] = field(default_factory=dict)
    merges: dict[str, MergeReport] = field(default_factory=dict)  # by the merged variant's id
    paired: list[Paired] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    schema: int = SCHEMA
