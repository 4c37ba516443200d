"""Train: one arm with TRL's SFTTrainer and PEFT's LoRA. Both arms share everything but the text, and that is checked.

The only module that imports TRL. The loss is on the completion only; the reference is never in the prompt.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import models
from hfsd.errors import BadRequest, HfsdError, Refusal, nearest
from hfsd.progress import Advance, track
from hfsd.recipe import Train as TrainRecipe
from hfsd.records import TrainReport, Variant, dumps
from hfsd.rundir import new_folder, write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPLETE = "COMPLETE"

# LoRA on all linear layers with alpha = 2r, as the paper's fine-tuning does; lm_head and embeddings stay as they are.
LORA = {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
MAX_LENGTH = 1024  # tokens
SFT = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "max_length": MAX_LENGTH,  # longer rows are left out of every arm, and counted
    "logging_steps": 1,
    "packing": False,  # packed sequences see one another unless the attention keeps them apart, which not all do
    "report_to": "none",
    "shuffle_dataset": False,  # the sampler shuffles, seeded alike for all arms
}
# What a run owns; a recipe that sets them would break resuming, or the comparison.
OWNED = (
    "output_dir",
    "logging_nan_inf_filter",
    "seed",
    "data_seed",
    "use_cpu",
    "push_to_hub",
    "hub_model_id",
    "save_strategy",
)


def check_fields(recipe: TrainRecipe) -> list[str]:
    """One line per field of train.sft or train.lora that the installed TRL and PEFT do not have."""
    if not (recipe.sft or recipe.lora):
        return []
    from peft import LoraConfig
    from trl import SFTConfig

    faults = []
    for block, given, kind in (("sft", recipe.sft, SFTConfig), ("lora", recipe.lora, LoraConfig)):
        known = [f.name for f in dataclasses.fields(kind) if f.init]
        for name in given:
            if name not in known:
                faults.append(f"train.{block}.{name}: {kind.__name__} has no such field{nearest(name, known)}")
            elif block == "sft" and name in OWNED:
                faults.append(f"train.sft.{name}: set by the run itself; remove it (train.seed is the seed)")
    return faults


def run(
    base: Path, data: Mapping[str, Path], variant: Variant, recipe: TrainRecipe, out: Path, weights: Mapping[str, str]
) -> TrainReport:
    """Trains one arm on the pruned checkpoint, resuming from the newest complete checkpoint if there is one.

    Args:
        base: folder of the pruned checkpoint.
        data: arm -> its rows (parquet, TRL's conversational prompt/completion form), the same ids in the same order.
        out: gets adapter/, merged/, losses.jsonl and train.json.
        weights: sha256 per weight file of `base`; part of what the arms must share.

    Raises:
        HfsdError: the loss is not finite, nothing is left to train on, or the merged model differs from the adapter.
        Refusal: the arm would not share weights, rows, steps or hyperparameters with an arm that is already trained.
    """
    from transformers import set_seed

    start = time.perf_counter()
    tokenizer = models.load_tokenizer(base)
    rows, left_out = _rows(data, variant.arm, tokenizer, int(recipe.sft.get("max_length") or MAX_LENGTH))
    set_seed(recipe.seed)  # the adapter's random start is the same for every arm
    model = models.load(base)
    with track(f"train {variant.arm}", 1, "steps") as advance:
        trainer = _trainer(model, tokenizer, rows, recipe, out / "work")
        settings = _hyperparameters(trainer, left_out)
        fairness = _fairness(trainer, rows, settings, weights)
        _same_as_others(out.parent, variant, fairness)
        resumed = _newest_complete(out / "work")
        _watch(trainer, advance)
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    losses = [[float(h["step"]), float(h["loss"])] for h in trainer.state.log_history if "loss" in h]
    write_atomic(out / "losses.jsonl", "".join(json.dumps({"step": s, "loss": v}) + "\n" for s, v in losses))
    lora_params = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    _save(trainer, base, out)
    report = TrainReport(
        variant=variant,
        adapter="adapter",
        merged="merged",
        rows=len(rows),
        steps=trainer.state.global_step,
        tokens=_trained_tokens(trainer),
        losses=losses,
        seconds=round(time.perf_counter() - start, 3),
        peak_bytes=_peak_bytes(),
        lora_params=lora_params,
        hyperparameters=settings,
        fairness=fairness,
    )
    write_atomic(out / "train.json", dumps(report))
    return report


def adopt(adapter: Path, base: Path, variant: Variant, out: Path) -> TrainReport:
    """Takes an adapter that the user already has as an arm: copied, merged, and marked as not trained here."""
    from peft import PeftModel

    if not (adapter / "adapter_config.json").is_file():
        raise BadRequest(f"train.adapter_from.{variant.arm}: {adapter} holds no adapter_config.json")
    start = time.perf_counter()
    model = models.load(base)
    try:
        tuned = PeftModel.from_pretrained(model, adapter)
    except (ValueError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise BadRequest(f"train.adapter_from.{variant.arm}: {adapter} does not fit {base}: {why}") from error
    lora_params = sum(p.numel() for n, p in tuned.named_parameters() if "lora_" in n)
    with new_folder(out / "adapter") as target:
        tuned.save_pretrained(target)
    _merge(tuned, base, out / "merged")
    seconds = round(time.perf_counter() - start, 3)
    settings = {"adapter_from": adapter.name}
    report = TrainReport(variant, "adapter", "merged", 0, 0, 0, [], seconds, _peak_bytes(), lora_params, settings, {})
    write_atomic(out / "train.json", dumps(report))
    return report


def _rows(
    data: Mapping[str, Path], arm: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[Dataset, int]:
    """This arm's rows that fit in every arm, so that all arms see the same ids in the same order."""
    import datasets

    # Without its own cache, datasets would write beside the parquet file of a finished stage.
    tables = {a: datasets.Dataset.from_parquet(str(p), keep_in_memory=True) for a, p in data.items()}
    ids = [list(t["id"]) for t in tables.values()]
    if any(other != ids[0] for other in ids):
        raise Refusal("the arms' training sets hold other rows or another order; make them again with --redo rewrite")
    fits = [
        all(length <= max_length for length in row)
        for row in zip(*(_lengths(t, tokenizer) for t in tables.values()), strict=True)
    ]
    kept = [i for i, fit in enumerate(fits) if fit]
    if not kept:
        raise HfsdError(f"train: none of {len(fits)} rows is within train.sft.max_length {max_length} tokens; raise it")
    if len(kept) < len(fits):
        print(
            f"train: {len(fits) - len(kept)} of {len(fits)} rows exceed {max_length} tokens in an arm: left out of all",
            file=sys.stderr,
        )
    return tables[arm].select(kept).select_columns(["id", "prompt", "completion"]), len(fits) - len(kept)


def _lengths(table: Dataset, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    lengths = []
    for row in table:
        ids = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True, return_dict=False)
        lengths.append(len(ids))
    return lengths


def _trainer(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Dataset, recipe: TrainRecipe, work: Path
) -> Any:
    import torch
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    on_cpu = model.device.type == "cpu"
    steps_between = 25
    settings = {
        **SFT,
        # TRL checkpoints gradients by default, which costs a forward pass; on a CPU memory is seldom what runs out.
        "gradient_checkpointing": not on_cpu,
        "bf16": not on_cpu and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": not on_cpu,
        "save_steps": steps_between,
        "save_total_limit": 2,
        **recipe.sft,
        "output_dir": str(work),
        "save_strategy": "steps",
        "use_cpu": on_cpu,
        "seed": recipe.seed,
        "data_seed": recipe.seed,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # the default logs the running mean in place of a loss that is not finite
    }
    lora = {**LORA, **recipe.lora}
    lora.setdefault("lora_alpha", 2 * lora["r"])
    try:
        config, peft_config = SFTConfig(**settings), LoraConfig(**lora)
        return SFTTrainer(
            model=model, args=config, train_dataset=rows, processing_class=tokenizer, peft_config=peft_config
        )
    except (ValueError, TypeError) as error:
        raise BadRequest(f"train: TRL or PEFT refuses these settings: {' '.join(str(error).split())[:300]}") from error


def _hyperparameters(trainer: Any, left_out: int) -> dict[str, Any]:
    """What shaped the training, as it was resolved; equal for all arms."""
    args, lora = trainer.args, trainer.model.peft_config["default"]
    targets = lora.target_modules
    names = [
        *("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
        *("weight_decay", "max_length", "warmup_steps", "packing", "bf16", "gradient_checkpointing", "seed"),
        "max_grad_norm",
    ]
    return {
        **{name: getattr(args, name) for name in names},
        "optim": str(getattr(args.optim, "value", args.optim)),
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "processes": args.world_size,
        "lora_r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "lora_targets": sorted(targets) if isinstance(targets, list | set | tuple) else str(targets),
        "rows_left_out": left_out,
    }


def _fairness(trainer: Any, rows: Dataset, settings: dict[str, Any], weights: Mapping[str, str]) -> dict[str, str]:
    """Hashes of what the arms must share."""
    args = trainer.args
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    start = hashlib.sha256()
    for name, parameter in sorted(trainer.model.named_parameters()):
        if parameter.requires_grad:
            start.update(name.encode() + parameter.detach().float().cpu().numpy().tobytes())

    def digest(value: Any) -> str:
        return hashlib.sha256(dumps(value).encode()).hexdigest()[:16]

    return {
        "base_weights": digest(dict(weights)),
        "adapter_start": start.hexdigest()[:16],
        "row_ids_in_order": digest(list(rows["id"])),
        "steps": f"{-(-len(rows) // per_step)} per epoch x {args.num_train_epochs:g}, max {args.max_steps}",
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


def _watch(trainer: Any, advance: Advance) -> None:
    """Progress, a stop on a loss that is not finite, and a marker in each checkpoint that is written whole."""
    import math

    from transformers import PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(state.global_step, total=state.max_steps)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            value = (logs or {}).get("loss")
            if value is None:
                return
            if not math.isfinite(float(value)):
                raise HfsdError(
                    f"train: the loss is {value} at step {state.global_step}; lower train.sft.learning_rate"
                )
            advance(args.logging_steps, note=f"loss {float(value):.3f}")

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                write_atomic(folder / COMPLETE, "")

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch)


def _newest_complete(work: Path) -> Path | None:
    """The newest checkpoint with its marker; torn ones are removed, or the trainer would count them as its own."""
    found = sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    for torn in [p for p in found if not (p / COMPLETE).is_file()]:
        shutil.rmtree(torn)
    return next((p for p in reversed(found) if p.is_dir()), None)


def _trained_tokens(trainer: Any) -> int:
    """Completion tokens that had a loss, all epochs together."""
    per_epoch = sum(sum(label != -100 for label in labels) for labels in trainer.train_dataset["labels"])
    return round(per_epoch * trainer.state.epoch)


def _save(trainer: Any, base: Path, out: Path) -> None:
    if not trainer.is_world_process_zero():
        return
    tuned = trainer.accelerator.unwrap_model(trainer.model)
    with new_folder(out / "adapter") as target:
        tuned.save_pretrained(target)
        (target / "README.md").unlink(missing_ok=True)  # PEFT's own card names local paths; ours is made by publish
    _merge(tuned.eval(), base, out / "merged")


def _merge(tuned: Any, base: Path, out: Path) -> None:
    """Writes the merged, stock checkpoint, after checking that its logits equal the adapter's."""
    import torch

    ids = torch.arange(1, 25, device=tuned.device)[None, :]  # [1, T]
    with torch.inference_mode():
        expected = tuned(input_ids=ids, use_cache=False).logits.float()  # [1, T, V]
        merged = tuned.merge_and_unload()
        off = (merged(input_ids=ids, use_cache=False).logits.float() - expected).abs().max().item()
    tolerance = (1e-3 if expected.dtype == merged.dtype else 0.1) * max(1.0, expected.abs().max().item())
    if not off <= tolerance:
        raise HfsdError(
            f"merging changed the logits by {off:.3g}, more than {tolerance:.3g}; keep the adapter and report this"
        )
    merged.config.use_cache = True  # training turns it off
    with new_folder(out) as target:
        merged.save_pretrained(target)
        for path in sorted(base.iterdir()):
            # Tokenizer, template and generation config are the pruned checkpoint's, byte for byte.
            if path.is_file() and "safetensors" not in path.name and path.name not in ("config.json", "README.md"):
                shutil.copy2(path, target / path.name)


def _peak_bytes() -> int:
    """Peak resident memory of this process so far (an accelerator's peak where there is one)."""
    import resource

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
