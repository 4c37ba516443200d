"""Train: one arm with TRL and PEFT. All arms of a run share everything but the text, and that is checked.

Every process of a launcher takes part; the first one writes.
"""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import adapters, figures, models, processes, schedule, trainers
from hfsd.errors import HfsdError, Refusal
from hfsd.progress import track
from hfsd.recipe import Train as TrainRecipe
from hfsd.records import TEXTS, PrunePlan, TrainReport, Variant, dumps
from hfsd.rundir import new_folder, write_atomic
from hfsd.trainers import Job, check_fields

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["adopt", "check_fields", "run"]


def run(
    base: Path,
    data: Mapping[str, Path],
    variant: Variant,
    recipe: TrainRecipe,
    out: Path,
    weights: Mapping[str, str],
    plan: PrunePlan,
    teacher: Callable[[], PreTrainedModel],
) -> TrainReport:
    """Trains one arm on the pruned checkpoint, resuming from the newest complete checkpoint if there is one.

    Args:
        base: folder of the pruned checkpoint.
        data: text (`reference`, `self-distilled`) -> its rows, the same ids in the same order.
        variant: the arm, its data and, where there are several, its seed.
        out: gets adapter/ (unless every weight is trained), merged/, losses.jsonl, loss.png and train.json.
        weights: sha256 per weight file of `base`; part of what the arms must share.
        plan: the cut, for `lora.scope: after-cut`.
        teacher: loads the original; called for the arms that learn from it, and let go when they have.

    Raises:
        HfsdError: the loss is not finite, memory ran out, nothing is left to train on, or the merged model differs from
            the adapter.
        Refusal: the arm would not share weights, rows, steps or hyperparameters with an arm that is already trained.
    """
    start = time.perf_counter()
    seed = recipe.seeds[0] if variant.seed is None else variant.seed
    job = Job(variant.arm, seed, recipe, _first_behind(plan), out / "work")
    tokenizer = models.load_tokenizer(base)
    rows = schedule.read(data, tokenizer, int(job.setting("max_length")))
    trained = _trained(job, base, tokenizer, rows, weights, variant, out, teacher)
    gc.collect()  # model, optimizer and teacher, before the adapter is merged
    report = TrainReport(
        variant=variant,
        adapter=None if recipe.method == "full" else "adapter",
        merged="merged",
        method=recipe.method,
        **trained,
        seconds=0.0,
        peak_bytes=_peak_bytes(),
    )
    if processes.rank():
        return report
    _save(job.work / "final", base, out, recipe.method)
    report = _timed(report, start)
    write_atomic(out / "losses.jsonl", "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in report.losses))
    figures.draw_loss([report], out)
    write_atomic(out / "train.json", dumps(report))
    return report


def adopt(adapter: Path, base: Path, variant: Variant, out: Path) -> TrainReport:
    """Takes an adapter that the user already has as an arm: copied, merged, and marked as not trained here."""
    asked_by = f"train.adapter_from.{variant.arm}"
    adapters.check(adapter, asked_by)
    start = time.perf_counter()
    params = adapters.merge(adapter, base, out / "merged", asked_by)
    adapters.keep(adapter, out / "adapter")
    settings = {"adapter_from": adapter.name}
    report = TrainReport(variant, "adapter", "merged", 0, 0, 0, [], 0.0, _peak_bytes(), params, settings, {})
    report = _timed(report, start)
    write_atomic(out / "train.json", dumps(report))
    return report


def _trained(
    job: Job,
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: schedule.Rows,
    weights: Mapping[str, str],
    variant: Variant,
    out: Path,
    teacher: Callable[[], PreTrainedModel],
) -> dict[str, Any]:
    """Trains and leaves the weights under work/final; what the report says of it."""
    from transformers import set_seed

    text = TEXTS[job.arm]
    whole = schedule.order(rows, _pace(job))
    mine = schedule.within_budget(rows, whole, text, _pace(job))
    if job.arm == "on-policy":
        mine = schedule.in_whole_steps(mine, _pace(job))
    set_seed(job.seed)  # the adapter's random start is the same for every arm
    model = trainers.load(base, job.recipe)
    with track(f"train {variant.id}", 1, "steps") as advance:
        trainer = trainers.build(job, model, tokenizer, rows.tables[text].select(mine), teacher)
        settings = trainers.hyperparameters(trainer, job, rows.left_out)
        fairness = _fairness(trainer, job, rows, whole, settings, weights)
        _same_as_others(out.parent, variant, fairness)
        resumed = trainers.newest_complete(job.work)
        processes.wait()
        trainers.watch(trainer, advance)
        start = time.perf_counter()
        _go(trainer, resumed)
        seconds = time.perf_counter() - start
    trainer.save_model(str(job.work / "final"))
    losses = [[float(h["step"]), float(h["loss"])] for h in trainer.state.log_history if "loss" in h]
    return {
        "rows": len(rows),
        "steps": trainer.state.global_step,
        "tokens": _sampled(trainer, _pace(job)) if job.arm == "on-policy" else sum(rows.trained[text][i] for i in mine),
        "losses": losses,
        "trained_params": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "hyperparameters": settings,
        "fairness": fairness,
        "engine": trainers.engine(trainer),
        "train_seconds": round(seconds, 3),
    }


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
    """Tokens of the answers that the pruned model made and was trained on, from TRL's means per logged step."""
    logged = [h for h in trainer.state.log_history if "completions/mean_length" in h]
    before = [0, *(h["step"] for h in logged)]
    steps = [h["step"] - b for h, b in zip(logged, before, strict=False)]
    return round(sum(h["completions/mean_length"] * n * pace.per_step for h, n in zip(logged, steps, strict=True)))


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


def _first_behind(plan: PrunePlan) -> int:
    """The first block behind the cut, counted in the pruned model; as many as it has where none is."""
    first = plan.removed[0] if plan.removed else plan.n_layers
    return sum(block < first for block in plan.kept)


def _fairness(
    trainer: Any,
    job: Job,
    rows: schedule.Rows,
    order: Sequence[int],
    settings: dict[str, Any],
    weights: Mapping[str, str],
) -> dict[str, str]:
    """Hashes of what the arms must share."""
    start = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        if parameter.requires_grad and job.recipe.method != "full":  # else these are the base's weights, hashed below
            start.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())

    def digest(value: Any) -> str:
        return hashlib.sha256(dumps(value).encode()).hexdigest()[:16]

    ids = next(iter(rows.tables.values()))["id"]
    pace = _pace(job)
    if job.recipe.budget == "rows":
        much = f"{-(-len(order) // pace.per_step)} steps of {pace.per_step} rows"
    else:
        much = f"{min(sum(t[i] for i in order) for t in rows.trained.values())} completion tokens, to the nearest row"
    return {
        "base_weights": digest(dict(weights)),
        "adapter_start": start.hexdigest()[:16],
        "row_ids_in_order": digest([ids[i] for i in order]),
        "budget": much,
        "hyperparameters": digest(settings),
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
        differ = [k for k in mine if mine[k] != report["fairness"].get(k)]
        if differ:
            raise Refusal(
                f"train: {variant.id} and {other.id} would differ in {', '.join(differ)}, not only in their text; "
                "make both again with --redo train"
            )


def _save(final: Path, base: Path, out: Path, method: str) -> None:
    """The arm's adapter and its merged, stock checkpoint, from what the trainer saved."""
    if not any(final.glob("*.safetensors")):
        raise HfsdError(
            f"train: {final} holds no weights; set fsdp_state_dict_type: FULL_STATE_DICT in the accelerate config"
        )
    if method != "full":
        adapters.keep(final, out / "adapter")
        adapters.merge(out / "adapter", base, out / "merged")
        return
    with new_folder(out / "merged") as target:
        for path in (*final.glob("*.safetensors*"), base / "config.json"):
            shutil.copy2(path, target / path.name)
        adapters.finish_checkpoint(base, target)
        models.load(target)  # refuses missing and left-over keys


def _timed(report: TrainReport, start: float) -> TrainReport:
    import dataclasses

    return dataclasses.replace(report, seconds=round(time.perf_counter() - start, 3))


def _peak_bytes() -> int:
    """Peak resident memory of this process so far (an accelerator's peak where there is one)."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
