"""TRL's trainers for the arms: SFTTrainer, GKDTrainer on the rewrites (no sampling), DistillationTrainer on-policy.

With `settings` the only module that imports TRL. The loss is on the completion only; the reference is never in the
prompt.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import models, processes, settings
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.progress import Advance
from hfsd.records import TAUGHT
from hfsd.rundir import write_atomic
from hfsd.settings import Job

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COMPLETE = "COMPLETE"


def load(base: Path, job: Job) -> PreTrainedModel:
    """The pruned model as its method trains it: qlora in 4 bits, full in float32, else in the device's own type."""
    import torch
    from transformers import BitsAndBytesConfig

    attention = (job.recipe.sft.get("model_init_kwargs") or {}).get("attn_implementation")
    dtype = settings.weights_dtype(job)
    if job.recipe.method != "qlora":
        return models.load(base, dtype, job.trust_remote_code, attention=attention)
    compute = getattr(torch, dtype)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # with double quantisation: the QLoRA paper's (arXiv 2305.14314)
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        bnb_4bit_quant_storage=compute,  # the storage that FSDP can shard
    )
    return models.load(base, dtype, job.trust_remote_code, attention=attention, quantization=four_bits)


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
        Refusal: there is no block behind the cut to adapt, or what is trained could not be saved whole.
    """
    try:
        trainer = _trainer(job, model, tokenizer, rows, teacher)
    except (ValueError, TypeError) as error:
        raise BadRequest(f"train: TRL or PEFT refuses these settings: {' '.join(str(error).split())[:300]}") from error
    if trainer.is_fsdp_enabled and "FULL" not in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        raise Refusal(
            "train: FSDP would save shards; set fsdp_state_dict_type: FULL_STATE_DICT in the accelerate config"
        )
    if job.recipe.scope == "after-cut" and trainer.args.gradient_checkpointing:
        _end_backward(models.decoder_blocks(model)[1][job.first_behind])
    return trainer


def adapter_config(trainer: Any) -> Any:
    """The LoraConfig in use; None where every weight is trained."""
    return getattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config", {}).get("default")


def engine(trainer: Any) -> str:
    """What really trains, such as `1 process` or `DDP over 2 processes (gloo)`, by the wrapper around the model."""
    import torch

    world = trainer.args.world_size
    names = [kind.__name__ for kind in type(trainer.model_wrapped).__mro__]
    by = {"DistributedDataParallel": "DDP", "FSDPModule": "FSDP2", "FullyShardedDataParallel": "FSDP1"}
    by |= {"DeepSpeedEngine": "DeepSpeed"}
    how = next((by[n] for n in names if n in by), "no wrapper")
    told = "1 process" if world == 1 else f"{how} over {world} processes ({torch.distributed.get_backend()})"
    wanted = {"FSDP": "ACCELERATE_USE_FSDP", "DeepSpeed": "ACCELERATE_USE_DEEPSPEED"}
    asked = [name for name, variable in wanted.items() if os.environ.get(variable, "").lower() == "true"]
    missed = [name for name in asked if not how.startswith(name)]
    return told + "".join(f"; {name} was asked for, and accelerate does not run it here" for name in missed)


def watch(trainer: Any, advance: Advance) -> None:
    """Progress, a stop on a loss that is not finite, and a marker in each checkpoint that is written whole."""
    from transformers import PrinterCallback, TrainerCallback

    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ

    class Watch(TrainerCallback):
        seen = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seen = state.global_step
            advance(state.global_step, total=state.max_steps)
            if state.is_world_process_zero and launched:
                print(f"train: {engine(trainer)}", file=sys.stderr)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            value = (logs or {}).get("loss")
            if value is None:
                return
            if not math.isfinite(float(value)):
                raise HfsdError(
                    f"train: the loss is {value} at step {state.global_step}; lower train.sft.learning_rate"
                )
            advance(state.global_step - self.seen, note=f"loss {float(value):.3f}")
            self.seen = state.global_step

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


def _trainer(
    job: Job,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    teacher: Callable[[], PreTrainedModel],
) -> Any:
    import trl

    if job.arm in TAUGHT and isinstance(rows[0]["prompt"], str):
        raise Refusal(f"train.arms: {job.arm} needs a chat template, and the model's tokenizer has none")
    given = settings.arguments(job, model)
    shared = {"model": model, "processing_class": tokenizer, "peft_config": settings.lora(job, model)}
    if job.arm == "sdd+kd":
        config, kind = settings.gkd()
        # GKDTrainer divides by the tokens of all processes and does not make up for DDP's mean, as SFTTrainer does
        given["average_tokens_across_devices"] = processes.count() == 1
        talks = rows.map(lambda row: {"messages": row["prompt"] + row["completion"]}).select_columns(["messages"])
        return kind(args=_alone(config(**given)), train_dataset=talks, teacher_model=teacher(), **shared)
    if job.arm == "on-policy":
        tokenizer.padding_side = "left"
        args, prompts = _alone(trl.DistillationConfig(**given)), rows.select_columns(["prompt"])
        return trl.DistillationTrainer(args=args, train_dataset=prompts, teacher_model=teacher(), **shared)
    return trl.SFTTrainer(args=_alone(trl.SFTConfig(**given)), train_dataset=rows, **shared)


def _alone(args: Any) -> Any:
    """One process trains on one device: with several in sight transformers takes DataParallel, which TRL refuses."""
    if args.n_gpu > 1:
        args._n_gpu = 1
    return args


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
