"""What TRL and PEFT are told: our defaults, what a recipe adds, and what a run keeps to itself."""

from __future__ import annotations

import dataclasses
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from hfsd import adapters, models
from hfsd.blocks_recovery import Train as TrainRecipe
from hfsd.errors import BadRequest, HfsdError, Refusal, nearest
from hfsd.records import TAUGHT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
# What a run keeps to itself: with these set, resuming, the comparison, or "loss on the completion only" would not hold.
OWNED = (
    *("output_dir", "logging_nan_inf_filter", "logging_strategy", "seed", "data_seed", "use_cpu", "disable_tqdm"),
    *("push_to_hub", "hub_model_id", "save_strategy", "save_only_model", "ignore_data_skip", "resume_from_checkpoint"),
    *("auto_find_batch_size", "shuffle_dataset", "dataset_kwargs", "remove_unused_columns", "dataloader_drop_last"),
    *("accelerator_config", "eval_strategy", "load_best_model_at_end", "completion_only_loss", "assistant_only_loss"),
    *("chat_template_path", "eos_token", "truncation_mode", "teacher_model_name_or_path", "teacher_model_init_kwargs"),
)
UNTOLD = ("output_dir", "logging_dir", "run_name", "hub_token", "report_to", "base_model_name_or_path")  # shape nothing


@dataclass(frozen=True)
class Job:
    """One arm, one seed, on one pruned model.

    `first_behind` is the first block behind the cut, in the pruned model's numbering; `longest` the tokens of the
    longest row in any text.
    """

    arm: str
    seed: int
    recipe: TrainRecipe
    first_behind: int
    work: Path
    dtype: str = "auto"
    trust_remote_code: bool = False
    longest: int = 0

    def setting(self, name: str) -> Any:
        """A field of train.sft, or its default."""
        return {**SFT, **self.recipe.sft}[name]


def check_fields(recipe: TrainRecipe) -> list[str]:
    """One line per field of train.sft, lora, kd or on_policy that cannot be, and per arm that cannot be trained."""
    blocks = {"sft": recipe.sft, "lora": recipe.lora, "kd": recipe.kd, "on_policy": recipe.on_policy}
    faults = [fault for block, given in blocks.items() if given for fault in _block_faults(block, given)]
    faults += [f"train.lora.{fault}" for fault in adapters.faults(recipe.lora)]
    if recipe.sft.get("packing") and recipe.budget == "rows":
        faults.append(
            "train.sft.packing: arms whose texts differ in length would take another number of steps; add "
            "train.budget: tokens"
        )
    if recipe.sft.get("max_length", 1) is None:
        faults.append("train.sft.max_length: give the tokens of the longest row to train on; none is no limit here")
    if recipe.sft.get("save_total_limit", 2) == 1:
        faults.append("train.sft.save_total_limit: at 1, the last whole checkpoint is gone while the next is written")
    for fault in (_four_bit_fault(recipe), _arm_fault(recipe)):
        faults += [fault] if fault else []
    return faults


def _block_faults(block: str, given: dict[str, Any]) -> list[str]:
    kind = config_class(block)
    known = _fields(kind) + (["scope"] if block == "lora" else [])
    shared = _fields(config_class("sft")) if block in ("kd", "on_policy") else []
    faults = []
    for name in given:
        if name not in known:
            faults.append(f"train.{block}.{name}: {kind.__name__} has no such field{nearest(name, known)}")
        elif block != "lora" and name in OWNED:
            faults.append(f"train.{block}.{name}: set by the run itself; remove it (train.seeds are the seeds)")
        elif name in shared:
            faults.append(f"train.{block}.{name}: shared by all arms; set it in train.sft")
    init = given.get("model_init_kwargs") if block == "sft" else None
    return faults + [
        f"train.sft.model_init_kwargs.{name}: only attn_implementation is taken here; the model is the run's"
        for name in init or {}
        if name != "attn_implementation"
    ]


def _fields(kind: Any) -> list[str]:
    return [f.name for f in dataclasses.fields(kind) if f.init]


def _four_bit_fault(recipe: TrainRecipe) -> str:
    import importlib.util

    if recipe.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return "train.method: qlora needs bitsandbytes: pip install 'hfsd[qlora]'"
    return ""


def _arm_fault(recipe: TrainRecipe) -> str:
    """Told before hours of rewriting, not after them."""
    try:
        if "sdd+kd" in recipe.arms:
            gkd()
    except HfsdError as error:
        return str(error)
    return ""


def config_class(block: str) -> Any:
    """The class whose fields a block of the recipe passes on."""
    import trl
    from peft import LoraConfig

    if block == "kd":
        return gkd()[0]
    return {"sft": trl.SFTConfig, "lora": LoraConfig, "on_policy": trl.DistillationConfig}[block]


def gkd() -> tuple[Any, Any]:
    """TRL's GKDConfig and GKDTrainer, which it calls experimental.

    Raises:
        HfsdError: they have moved; the version is named.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that they may move is what the error below is for
            from trl.experimental.gkd import GKDConfig, GKDTrainer
    except ImportError as error:
        from trl import __version__

        raise HfsdError(
            f"train.arms: sdd+kd needs trl.experimental.gkd, which TRL {__version__} does not have ({error}); "
            "install trl==1.16.0, or leave the arm out"
        ) from None
    return GKDConfig, GKDTrainer


def arguments(job: Job, model: PreTrainedModel) -> dict[str, Any]:
    """What the arm's config class is made of."""
    on_cpu = model.device.type == "cpu"
    more = {"sdd+kd": {**KD, **job.recipe.kd}, "on-policy": job.recipe.on_policy}.get(job.arm, {})
    made = {
        **SFT,
        "gradient_checkpointing": checkpoints(job, model),
        "bf16": has_bf16(),
        "dataloader_pin_memory": not on_cpu,
        **job.recipe.sft,
        **more,
        "packing": packs(job, model),
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
    if job.arm == "on-policy":
        known = _fields(config_class("on_policy"))  # it has no use for max_length and packing
        return {k: v for k, v in made.items() if k in known} | {"logging_steps": 1}  # each step tells its tokens
    return made


def packs(job: Job, model: PreTrainedModel) -> bool:
    """Whether rows are packed: by default where attention keeps packed rows apart and the budget counts tokens.

    Packing puts as many rows into a step as fit, so that arms whose texts differ in length would take other steps.
    """
    apart = "flash" in str(model.config._attn_implementation)
    default = job.recipe.budget == "tokens" and apart
    return job.arm not in TAUGHT and bool(job.recipe.sft.get("packing", default))


def lora(job: Job, model: PreTrainedModel) -> Any:
    """The LoraConfig of an arm; None where every weight is trained."""
    from peft import LoraConfig

    if job.recipe.method == "full":
        return None
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


def weights_dtype(job: Job) -> str:
    """The type in which an arm's weights are loaded to be trained, such as `float32`; in 4 bits, the storage's."""
    if job.recipe.method == "full":
        return "float32"  # half-precision weights would swallow the small updates of a full training
    if job.recipe.method == "qlora":
        return "bfloat16" if has_bf16() else "float32"
    return models.loaded_dtype(job.dtype)


def checkpoints(job: Job, model: PreTrainedModel) -> bool:
    """Whether an arm is trained with gradient checkpointing, which costs a forward pass.

    TRL's default is to; ours, too, but on a CPU only where memory demands it.
    """
    default = models.device().type != "cpu" or crowded(job, model)
    return bool(job.recipe.sft.get("gradient_checkpointing", default))


def adapted(job: Job, model: PreTrainedModel, checkpointed: bool) -> Any:
    """The model as an arm's trainer trains it: with its adapter, if it has one, and in training mode."""
    from peft import get_peft_model

    asked = lora(job, model)
    tuned: Any = model if asked is None else get_peft_model(model, asked)
    if checkpointed:
        tuned.gradient_checkpointing_enable()
        tuned.enable_input_require_grads()
    return tuned.train()


def hyperparameters(args: Any, lora_config: Any, job: Job, left_out: int) -> dict[str, Any]:
    """What shapes the training, as it was resolved, for cards and reports; equal for all arms of a run."""
    names = [
        *("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "weight_decay"),
        *("warmup_steps", "bf16", "gradient_checkpointing", "seed", "max_grad_norm"),
    ]
    told = {name: getattr(args, name) for name in names}
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
    if lora_config is None:
        return told
    targets = lora_config.target_modules
    return told | {
        "lora_r": lora_config.r,
        "lora_alpha": lora_config.lora_alpha,
        "lora_dropout": lora_config.lora_dropout,
        "lora_targets": sorted(targets) if isinstance(targets, list | set | tuple) else str(targets),
        "lora_scope": job.recipe.scope,
    }


def everything(args: Any, lora_config: Any) -> dict[str, str]:
    """Every field that arms share, as text: the ones common to all of TRL's config classes, and PEFT's."""
    shared = set(_fields(config_class("sft"))) & set(_fields(config_class("on_policy"))) - set(UNTOLD)
    shared -= {"logging_steps", "remove_unused_columns", "average_tokens_across_devices"}  # differ by trainer alone
    found = {name: str(getattr(args, name)) for name in sorted(shared)}
    if lora_config is not None:
        held = lora_config.to_dict()
        values = {k: sorted(v) if isinstance(v, set) else v for k, v in sorted(held.items()) if k not in UNTOLD}
        found |= {f"lora.{k}": str(v) for k, v in values.items()}
    return found


def fuse_head(model: PreTrainedModel) -> None:
    """Gives a model the head that SFTTrainer trains with: it makes the logits in tiles, never all at once."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))


def has_bf16() -> bool:
    """Whether the accelerator computes bfloat16 natively."""
    import torch

    device = models.device()
    if device.type in ("cpu", "mps"):
        return False
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.get_device_module(device).is_bf16_supported())


def _before_cut(job: Job, model: PreTrainedModel) -> str:
    """A pattern for the modules of the blocks before the cut."""
    name, blocks = models.decoder_blocks(model)
    if job.first_behind >= len(blocks):
        raise Refusal("train.lora.scope: after-cut: no block lies behind the cut; use scope: all")
    before = "|".join(map(str, range(job.first_behind)))
    return rf".*{re.escape(name)}\.(?:{before})\..*" if before else "(?!)"


def crowded(job: Job, model: PreTrainedModel) -> bool:
    """Whether the activations of one batch would fill half of the free memory.

    About 18 numbers per hidden unit and 4 per unit of the MLP are kept for the backward pass of each block and token,
    and two per word of the vocabulary for the head (float32). A guess that errs high.
    """
    config = model.config.get_text_config(decoder=True)
    hidden = int(config.hidden_size)
    inner = getattr(config, "intermediate_size", None)
    per_token = int(config.num_hidden_layers) * (18 * hidden + 4 * (inner if isinstance(inner, int) else 4 * hidden))
    per_token += 2 * int(config.vocab_size)
    tokens = int(job.setting("per_device_train_batch_size")) * job.longest
    return 4 * tokens * per_token > psutil.virtual_memory().available / 2
