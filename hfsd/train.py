"""Train: one arm with TRL and PEFT. All arms of a run share everything but the text, and that is checked.

Every process of a launcher takes part; the first one writes.
"""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import adapters, figures, models, processes, schedule, settings, trainers
from hfsd.blocks_recovery import Train as TrainRecipe
from hfsd.errors import HfsdError, Refusal
from hfsd.plain import dumps
from hfsd.progress import track
from hfsd.records import TEXTS, PrunePlan, TrainReport, Variant
from hfsd.rundir import write_atomic
from hfsd.settings import Job, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Pruned", "adopt", "check_fields", "run"]

BEGUN = "fairness.json"  # what an arm was begun with, under work/


@dataclasses.dataclass(frozen=True)
class Pruned:
    """The pruned checkpoint that arms start from.

    `sha256` is per weight file, and part of what the arms must share; `dtype` is the recipe's for the model.
    """

    folder: Path
    plan: PrunePlan
    sha256: Mapping[str, str]
    dtype: str = "auto"
    trust_remote_code: bool = False

    @property
    def first_behind(self) -> int:
        """The first block behind the cut, counted in the pruned model; as many as it has where none is."""
        first = self.plan.removed[0] if self.plan.removed else self.plan.n_layers
        return sum(block < first for block in self.plan.kept)


def run(
    pruned: Pruned,
    data: Mapping[str, Path],
    variant: Variant,
    recipe: TrainRecipe,
    out: Path,
    teacher: Callable[[], PreTrainedModel],
) -> TrainReport:
    """Trains one arm on the pruned checkpoint, resuming from the newest complete checkpoint if there is one.

    Args:
        data: text (`reference`, `self-distilled`) -> its rows, the same ids in the same order.
        variant: the arm, its data and, where there are several, its seed.
        out: gets adapter/ (unless every weight is trained), merged/, losses.jsonl, loss.png and train.json.
        teacher: loads the original; called for the arms that learn from it, and let go when they have.

    Raises:
        HfsdError: the loss is not finite, memory ran out, nothing is left to train on, or the merged model differs from
            the adapter.
        Refusal: the arm would not share weights, rows, steps or hyperparameters with an arm that is already trained, or
            with its own beginning.
    """
    start = time.perf_counter()
    tokenizer = models.load_tokenizer(pruned.folder, pruned.trust_remote_code)
    max_length = int({**settings.SFT, **recipe.sft}["max_length"])
    rows = schedule.read(data, tokenizer, max_length)
    job = Job(
        variant.arm,
        recipe.seeds[0] if variant.seed is None else variant.seed,
        recipe,
        pruned.first_behind,
        out / "work",
        pruned.dtype,
        pruned.trust_remote_code,
        longest=max(max(lengths) for lengths in rows.lengths.values()),
    )
    report = _trained(job, pruned, tokenizer, rows, variant, out, teacher)
    gc.collect()  # model, optimizer and teacher, before the adapter is merged
    if processes.rank():
        return report
    _save(job.work / "final", pruned, out, recipe.method)
    report = dataclasses.replace(report, seconds=round(time.perf_counter() - start, 3))
    write_atomic(out / "losses.jsonl", "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in report.losses))
    figures.draw_loss([report], out)
    write_atomic(out / "train.json", dumps(report))
    return report


def adopt(adapter: Path, pruned: Pruned, variant: Variant, out: Path) -> TrainReport:
    """Takes an adapter that the user already has as an arm: copied, merged, and marked as not trained here."""
    asked_by = f"train.adapter_from.{variant.arm}"
    adapters.check(adapter, asked_by)
    start = time.perf_counter()
    params = adapters.merge(adapter, pruned.folder, out / "merged", asked_by, pruned.trust_remote_code)
    adapters.keep(adapter, out / "adapter")
    report = TrainReport(
        variant=variant,
        adapter="adapter",
        merged="merged",
        rows=0,
        steps=0,
        tokens=0,
        losses=[],
        seconds=round(time.perf_counter() - start, 3),
        peak_bytes=processes.peak_bytes(),
        trained_params=params,
        hyperparameters={"adapter_from": adapter.name},
        fairness={},
    )
    write_atomic(out / "train.json", dumps(report))
    return report


def _trained(
    job: Job,
    pruned: Pruned,
    tokenizer: Any,
    rows: schedule.Rows,
    variant: Variant,
    out: Path,
    teacher: Callable[[], PreTrainedModel],
) -> TrainReport:
    """Trains and leaves the weights under work/final; what there is to tell of it."""
    from transformers import set_seed

    text, pace = TEXTS[job.arm], _pace(job)
    whole = schedule.order(rows, pace)
    mine = schedule.within_budget(rows, whole, text, pace)
    # beside the stages: the curves of all arms of a run in one place, and no part of a result
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(out.parent.parent / "tensorboard" / variant.id)
    set_seed(job.seed)  # the adapter's random start is the same for every arm
    model = trainers.load(pruned.folder, job)
    with track(f"train {variant.id}", 1, "steps") as advance:
        trainer = trainers.build(job, model, tokenizer, rows.tables[text].select(mine), teacher)
        told = settings.hyperparameters(trainer.args, trainers.adapter_config(trainer), job, rows.left_out)
        fairness = _fairness(trainer, rows, whole, pace, told, pruned)
        _same_as_others(out.parent, variant, fairness)
        _same_as_begun(job.work, variant, fairness)
        params = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        resumed = trainers.newest_complete(job.work)
        processes.wait()
        trainers.watch(trainer, advance)
        start = time.perf_counter()
        _go(trainer, resumed)
        seconds = time.perf_counter() - start
    trainer.save_model(str(job.work / "final"))
    losses = [[float(h["step"]), float(h["loss"])] for h in trainer.state.log_history if "loss" in h]
    given = sum(rows.trained[text][i] for i in mine)
    return TrainReport(
        variant=variant,
        adapter=None if job.recipe.method == "full" else "adapter",
        merged="merged",
        rows=len(rows),
        steps=trainer.state.global_step,
        tokens=_sampled(trainer, pace) if job.arm == "on-policy" else given,
        losses=losses,
        seconds=0.0,
        peak_bytes=processes.peak_bytes(),
        trained_params=params,
        hyperparameters=told,
        fairness=fairness,
        method=job.recipe.method,
        engine=trainers.engine(trainer),
        train_seconds=round(seconds, 3),
    )


def _go(trainer: Any, resumed: Path | None) -> None:
    from accelerate.utils.memory import should_reduce_batch_size

    try:
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        size = trainer.args.per_device_train_batch_size
        raise HfsdError(
            f"train: memory ran out with {size} rows at once; halve train.sft.per_device_train_batch_size and double "
            "gradient_accumulation_steps, or set train.sft.gradient_checkpointing: true"
        ) from error


def _sampled(trainer: Any, pace: schedule.Pace) -> int:
    """Tokens of the answers that the pruned model made and was trained on, from TRL's mean of each step."""
    logged = [h["completions/mean_length"] for h in trainer.state.log_history if "completions/mean_length" in h]
    return round(sum(logged) * pace.per_step)


def _pace(job: Job) -> schedule.Pace:
    per_device, steps = job.setting("per_device_train_batch_size"), job.setting("gradient_accumulation_steps")
    return schedule.Pace(
        per_step=int(per_device) * int(steps) * processes.count(),
        epochs=float(job.setting("num_train_epochs")),
        max_steps=int(job.setting("max_steps")),
        strategy=str(job.setting("train_sampling_strategy")),
        budget=job.recipe.budget,
        seed=job.seed,
    )


def _fairness(
    trainer: Any,
    rows: schedule.Rows,
    order: Sequence[int],
    pace: schedule.Pace,
    told: dict[str, Any],
    pruned: Pruned,
) -> dict[str, str]:
    """Hashes of what the arms must share."""
    config = trainers.adapter_config(trainer)
    start = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        if parameter.requires_grad and config is not None:  # else these are the base's weights, hashed below
            start.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())

    def digest(value: Any) -> str:
        return hashlib.sha256(dumps(value).encode()).hexdigest()[:16]

    ids = next(iter(rows.tables.values()))["id"]
    if pace.budget == "rows":
        much = f"{len(order) // pace.per_step} steps of {pace.per_step} rows"
    else:
        least = min(sum(trained[i] for i in order) for trained in rows.trained.values())
        much = f"{least} completion tokens, to the nearest step of {pace.per_step} rows"
    return {
        "base_weights": digest(dict(pruned.sha256)),
        "adapter_start": start.hexdigest()[:16],
        "row_ids_in_order": digest([ids[i] for i in order]),
        "budget": much,
        "hyperparameters": digest([told, settings.everything(trainer.args, config)]),
    }


def _same_as_others(folder: Path, variant: Variant, mine: dict[str, str]) -> None:
    """Asserts that this arm shares everything but the text with every arm of its data and seed that is trained."""
    for path in sorted(folder.glob("*/train.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        other = Variant(**report["variant"])
        if (
            other.arm == variant.arm
            or (other.data, other.seed) != (variant.data, variant.seed)
            or not report["fairness"]
        ):
            continue
        if differ := [k for k in mine if mine[k] != report["fairness"].get(k)]:
            raise Refusal(
                f"train: {variant.id} and {other.id} would differ in {', '.join(differ)}, not only in their text; "
                "make both again with --redo train"
            )


def _same_as_begun(work: Path, variant: Variant, mine: dict[str, str]) -> None:
    """Refuses to go on with an arm on another number of processes, or with another library's defaults."""
    path = work / BEGUN
    if path.is_file():
        begun = json.loads(path.read_text(encoding="utf-8"))
        if differ := [k for k in mine if mine[k] != begun.get(k)]:
            raise Refusal(
                f"train: {variant.id} was begun with other {', '.join(differ)} (another number of processes?); go on "
                f"as it was begun, or remove {work}"
            )
    elif processes.rank() == 0:
        write_atomic(path, dumps(mine))


def _save(final: Path, pruned: Pruned, out: Path, method: str) -> None:
    """The arm's adapter and its merged, stock checkpoint, from what the trainer saved."""
    if not any(final.glob("*.safetensors")):
        raise HfsdError(
            f"train: {final} holds no weights; under DeepSpeed ZeRO-3 set "
            "stage3_gather_16bit_weights_on_model_save: true"
        )
    if method == "full":
        adapters.whole(final, pruned.folder, out / "merged", pruned.trust_remote_code)
        return
    adapters.keep(final, out / "adapter")
    adapters.merge(out / "adapter", pruned.folder, out / "merged", trust_remote_code=pruned.trust_remote_code)
