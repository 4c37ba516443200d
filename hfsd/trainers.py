"""TRL's trainers for the arms, and the settings that they share. The only module that imports TRL.

sft and self-distilled: SFTTrainer. sdd+kd: GKDTrainer on the rewrites, no sampling. on-policy: DistillationTrainer. The
loss is on the completion only; the reference is never in the prompt.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import models, processes
from hfsd.errors import BadRequest, HfsdError, Refusal, nearest
from hfsd.progress import Advance
from hfsd.recipe import Train as TrainRecipe
from hfsd.rundir import write_atomic

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPLETE = "COMPLETE"
TAUGHT = ("sdd+kd", "on-policy")  # arms that learn from the original itself, which stays in memory while they do

# LoRA on all linear layers with alpha = 2r, as the paper's fine-tuning does; lm_head and embeddings stay as they are.
LORA = {"r": 16, "target_modules": "all-linear", "lora_dropout": 0.0, "task_type": "CAUSAL_LM"}
SFT = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 1,
    "max_steps": -1,
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,  # below 1: a share of all steps
    "max_length": 1024,  # tokens; longer rows are left out of every arm, and counted
    "train_sampling_strategy": "group_by_length",  # little is padded; see `schedule.order`
    "logging_steps": 1,
    "save_steps": 25,
    "save_total_limit": 2,
    "report_to": "none",
}
# Rewrites of the original need no sampling, and are learned towards its whole distribution: KL(original || pruned).
KD = {"lmbda": 0.0, "beta": 0.0}
# What a run owns; a recipe that sets them would break resuming, or the comparison.
OWNED = (
    *("output_dir", "logging_nan_inf_filter", "seed", "data_seed", "use_cpu", "push_to_hub", "hub_model_id"),
    *("save_strategy", "auto_find_batch_size", "shuffle_dataset", "dataset_kwargs", "remove_unused_columns"),
    "teacher_model_name_or_path",
)
# What shapes a training, equal for all arms of a run; TRL's and PEFT's names.
TOLD = (
    *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay", "warmup_steps"),
    *("bf16", "gradient_checkpointing", "seed", "max_grad_norm"),
)


@dataclass(frozen=True)
class Job:
    """One arm, one seed. `first_adapted` is the first block behind the cut, in the pruned model's numbering."""

    arm: str
    seed: int
    recipe: TrainRecipe
    first_adapted: int
    work: Path

    def setting(self, name: str) -> Any:
        """A field of train.sft, or its default."""
        return {**SFT, **self.recipe.sft}[name]


def check_fields(recipe: TrainRecipe) -> list[str]:
    """One line per field of train.sft, lora, kd or on_policy that the installed TRL and PEFT do not have."""
    blocks = {"sft": recipe.sft, "lora": recipe.lora, "kd": recipe.kd, "on_policy": recipe.on_policy}
    faults = []
    for block, given in blocks.items():
        if not given:
            continue
        kind = _config_class(block)
        known = [f.name for f in dataclasses.fields(kind) if f.init] + (["scope"] if block == "lora" else [])
        for name in given:
            if name not in known:
                faults.append(f"train.{block}.{name}: {kind.__name__} has no such field{nearest(name, known)}")
            elif block != "lora" and name in OWNED:
                faults.append(f"train.{block}.{name}: set by the run itself; remove it (train.seeds are the seeds)")
    faults += [
        f"train.sft.model_init_kwargs.{name}: only attn_implementation is taken here; the model is the run's"
        for name in recipe.sft.get("model_init_kwargs") or {}
        if name != "attn_implementation"
    ]
    return faults


def load(base: Path, recipe: TrainRecipe) -> PreTrainedModel:
    """The pruned model as its method trains it: qlora in 4 bits, full in float32, else in the device's own type.

    Raises:
        BadRequest: qlora without bitsandbytes.
    """
    import torch
    from transformers import BitsAndBytesConfig

    attention = (recipe.sft.get("model_init_kwargs") or {}).get("attn_implementation")
    if recipe.method != "qlora":
        # half-precision weights would swallow the small updates of a full training
        return models.load(base, "float32" if recipe.method == "full" else "auto", attention=attention)
    try:
        import bitsandbytes  # noqa: F401 - transformers says it at length
    except ImportError:
        raise BadRequest("train.method: qlora needs bitsandbytes: pip install 'hfsd[qlora]'") from None
    compute = torch.bfloat16 if _has_bf16() else torch.float32
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # with double quantisation: the QLoRA paper's (arXiv 2305.14314)
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )
    return models.load(base, str(compute).removeprefix("torch."), quantization=four_bits, attention=attention)


def build(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    teacher: Callable[[], PreTrainedModel],
) -> Any:
    """The arm's trainer, which reads `rows` from the first to the last.

    Args:
        teacher: loads the original; called for the arms that learn from it.

    Raises:
        BadRequest: TRL or PEFT refuses a setting.
        Refusal: there is no block behind the cut to adapt, or the arm cannot be trained on this model.
    """
    lora = None if job.recipe.method == "full" else _lora(job, model)
    try:
        trainer = _trainer(job, model, tokenizer, rows, teacher, lora)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"train: TRL or PEFT refuses these settings: {' '.join(str(error).split())[:300]}") from error
    if job.recipe.scope == "after-cut" and trainer.args.gradient_checkpointing:
        _end_backward(models.decoder_blocks(model)[1][job.first_adapted])
    return trainer


def packs(job: Job, model: PreTrainedModel) -> bool:
    """Whether rows are packed: by default where attention keeps packed rows apart and the budget counts tokens.

    Packing puts as many rows into a step as fit, so that arms whose texts differ in length would take other steps.
    """
    apart = "flash" in str(model.config._attn_implementation)
    default = job.recipe.budget == "tokens" and apart and job.arm not in TAUGHT
    return bool(job.recipe.sft.get("packing", default))


def hyperparameters(trainer: Any, job: Job, left_out: int) -> dict[str, Any]:
    """What shaped the training, as it was resolved; equal for all arms of a run."""
    args = trainer.args
    told = {name: getattr(args, name) for name in TOLD}
    told |= {name: job.setting(name) for name in ("num_train_epochs", "max_steps", "max_length")}
    told |= {
        "train_sampling_strategy": job.setting("train_sampling_strategy"),
        "budget": job.recipe.budget,
        "method": job.recipe.method,
        "optim": str(getattr(args.optim, "value", args.optim)),
        "lr_scheduler_type": str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)),
        "processes": args.world_size,
        "rows_left_out": left_out,
    }
    if job.recipe.method == "full":
        return told
    lora = trainer.accelerator.unwrap_model(trainer.model).peft_config["default"]
    targets = lora.target_modules
    return told | {
        "lora_r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "lora_targets": sorted(targets) if isinstance(targets, list | set | tuple) else str(targets),
        "lora_scope": job.recipe.scope,
    }


def engine(trainer: Any) -> str:
    """What really trains, such as `1 process` or `DDP over 2 processes (gloo)`, by the wrapper around the model."""
    import torch

    if trainer.args.world_size == 1:
        return "1 process"
    wrapped = trainer.model_wrapped
    names = [kind.__name__ for kind in type(wrapped).__mro__]
    by = {"DistributedDataParallel": "DDP", "FSDPModule": "FSDP2", "FullyShardedDataParallel": "FSDP1"}
    by |= {"DeepSpeedEngine": "DeepSpeed"}
    how = next((by[n] for n in names if n in by), "no wrapper")
    told = f"{how} over {trainer.args.world_size} processes ({torch.distributed.get_backend()})"
    wanted = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    asked = [name for name, variable in wanted.items() if os.environ.get(variable, "").lower() == "true"]
    missed = [name for name in asked if not how.startswith(name)]
    return told + "".join(f"; {name} was asked for, and accelerate does not run it here" for name in missed)


def watch(trainer: Any, advance: Advance) -> None:
    """Progress, a stop on a loss that is not finite, and a marker in each checkpoint that is written whole."""
    from transformers import PrinterCallback, TrainerCallback

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            advance(state.global_step, total=state.max_steps)
            if state.is_world_process_zero and args.world_size > 1:
                print(f"train: {engine(trainer)}", file=sys.stderr)

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
            trainer.accelerator.wait_for_everyone()  # every process has written its part
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            if state.is_world_process_zero and folder.is_dir():
                write_atomic(folder / COMPLETE, "")

    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(Watch)


def newest_complete(work: Path) -> Path | None:
    """The newest checkpoint with its marker; torn ones are removed, or the trainer would count them as its own."""
    found = sorted(work.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    complete = [p for p in found if (p / COMPLETE).is_file()]
    if processes.rank() == 0:
        for torn in set(found) - set(complete):
            shutil.rmtree(torn)
    return complete[-1] if complete else None


def _config_class(block: str) -> type:
    """The class whose fields a block of the recipe passes on."""
    import trl
    from peft import LoraConfig

    if block == "kd":
        return _gkd()[0]
    return {"sft": trl.SFTConfig, "lora": LoraConfig, "on_policy": trl.DistillationConfig}[block]


def _gkd() -> tuple[type, type]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it may move is what the error below is for
            from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        from trl import __version__

        raise HfsdError(
            f"train.arms: sdd+kd needs trl.experimental.gkd, which TRL {__version__} does not have ({error}); "
            "install trl==1.16.0, or leave the arm out"
        ) from None
    return GKDConfig, GKDTrainer


def _trainer(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    teacher: Callable[[], PreTrainedModel],
    lora: Any,
) -> Any:
    import trl

    packing = packs(job, model)
    if packing and job.recipe.budget == "rows":
        raise Refusal(
            "train.sft.packing: arms whose texts differ in length would take another number of steps; "
            "add train.budget: tokens"
        )
    shared: dict[str, Any] = {"model": model, "processing_class": tokenizer, "peft_config": lora}
    if job.arm not in TAUGHT:
        args = trl.SFTConfig(**_settings(job, model, {"packing": packing}))
        return trl.SFTTrainer(args=args, train_dataset=rows, **shared)
    if isinstance(rows[0]["prompt"], str):
        raise Refusal(f"train.arms: {job.arm} needs a chat template, and the model's tokenizer has none")
    if job.arm == "sdd+kd":
        config, trainer = _gkd()
        talks = rows.map(lambda row: {"messages": row["prompt"] + row["completion"]}).select_columns(["messages"])
        args = config(**_settings(job, model, {**KD, **job.recipe.kd}))
        return trainer(args=args, train_dataset=talks, teacher_model=teacher(), **shared)
    tokenizer.padding_side = "left"
    known = {f.name for f in dataclasses.fields(trl.DistillationConfig)}
    asked = {k: v for k, v in _settings(job, model, job.recipe.on_policy).items() if k in known}
    args = trl.DistillationConfig(**asked)
    prompts = rows.select_columns(["prompt"])
    return trl.DistillationTrainer(args=args, train_dataset=prompts, teacher_model=teacher(), **shared)


def _settings(job: Job, model: PreTrainedModel, more: dict[str, Any]) -> dict[str, Any]:
    on_cpu = model.device.type == "cpu"
    return {
        **SFT,
        # TRL checkpoints gradients by default, which costs a forward pass; on a CPU memory is seldom what runs out.
        "gradient_checkpointing": not on_cpu,
        "bf16": _has_bf16(),
        "dataloader_pin_memory": not on_cpu,
        **job.recipe.sft,
        **more,
        "model_init_kwargs": None,
        # The rows come in their order, all epochs of them, as many as are trained on.
        "num_train_epochs": 1,
        "max_steps": -1,
        "train_sampling_strategy": "sequential",
        "shuffle_dataset": False,
        "output_dir": str(job.work),
        "save_strategy": "steps",
        "use_cpu": on_cpu,
        "seed": job.seed,
        "data_seed": job.seed,
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,  # the default logs the running mean in place of a loss that is not finite
    }


def _lora(job: Job, model: PreTrainedModel) -> Any:
    from peft import LoraConfig

    asked = {**LORA, **{k: v for k, v in job.recipe.lora.items() if k != "scope"}}
    asked.setdefault("lora_alpha", 2 * asked["r"])
    if job.recipe.method == "dora":
        asked["use_dora"] = True
    if job.recipe.scope == "after-cut":
        if twice := {"exclude_modules", "layers_to_transform"} & asked.keys():
            raise BadRequest(f"train.lora: scope: after-cut says which blocks are adapted, and so does {min(twice)}")
        asked["exclude_modules"] = _before_cut(job, model)
    try:
        return LoraConfig(**asked)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"train.lora: PEFT refuses these settings: {' '.join(str(error).split())[:300]}") from error


def _end_backward(block: Any) -> None:
    """Ends the backward pass at the input of a block.

    Without checkpointing it ends there by itself: nothing before needs a gradient. For checkpoints, TRL and
    transformers both ask for gradients of the embeddings, and it would run through the blocks before the cut as well.
    """

    def cut(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (args[0].detach().requires_grad_(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach().requires_grad_()}

    block.register_forward_pre_hook(cut, with_kwargs=True)


def _before_cut(job: Job, model: PreTrainedModel) -> str:
    """A pattern for the modules of the blocks before the cut."""
    name, blocks = models.decoder_blocks(model)
    if job.first_adapted >= len(blocks):
        raise Refusal("train.lora.scope: after-cut: no block lies behind the cut; use scope: all")
    before = "|".join(map(str, range(job.first_adapted)))
    return rf".*{re.escape(name)}\.(?:{before})\..*" if before else "(?!)"


def _has_bf16() -> bool:
    """Whether the accelerator computes bfloat16 natively."""
    import torch

    device = models.device()
    if device.type in ("cpu", "mps"):
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.get_device_module(device).is_bf16_supported())
