"""What training an arm takes in memory per process, from the config alone.

One step is run on tensors that have a shape and no storage (torch's FakeTensorMode), with the model, the adapter, the
head and the checkpointing that the arm is trained with, and the storages that live at a time are summed. So nothing is
guessed of what a class keeps for its backward pass.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hfsd import cost, models, settings
from hfsd.records import TAUGHT
from hfsd.settings import Job

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

FEW = (2, 4)  # blocks that are run where all are alike
# bytes per weight of nf4 in blocks of 64 with a scale in 8 bits, and of 256 of them one in 32 (arXiv 2305.14314)
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True)
class Memory:
    """Peak memory of one process that trains an arm, in bytes; the parts add up to `total`.

    `activations` is what lives at the peak beside the rest: what the backward pass needs, and what the loss makes of
    `rows` times `tokens` tokens. `libraries` is the interpreter with torch, transformers and TRL, counted where the
    memory is a process's own (on a CPU). `free` is the device's free memory. Where the class does not run on shapes
    alone, `activations` and `total` are None, and `note` says why.
    """

    arm: str
    method: str
    rows: int
    tokens: int
    checkpointing: bool
    dtype: str
    trained_params: int
    weights: int
    gradients: int
    optimizer: int
    teacher: int
    libraries: int
    activations: int | None
    total: int | None
    free: int
    note: str = ""


def of_arm(job: Job, config: PreTrainedConfig, original: PreTrainedConfig) -> Memory:
    """The memory of one arm.

    Args:
        job: the arm and its recipe; `job.longest` is the tokens of the longest row.
        config: of the cut model.
        original: of the teacher of the arms that have one.
    """
    model = _loaded(job, config)
    checkpoints = settings.checkpoints(job, model)
    spared = _spared_by_4_bits(model) if job.recipe.method == "qlora" else 0
    name = type(model).__name__
    tuned = settings.adapted(job, model, checkpoints)
    trained = [p for p in tuned.parameters() if p.requires_grad]
    gradients = sum(p.numel() * p.element_size() for p in trained)
    optimizer, note = _optimizer(job, trained)
    weights = sum(p.numel() * p.element_size() for p in (*tuned.parameters(), *tuned.buffers())) - spared
    teacher = 0
    if job.arm in TAUGHT:
        held = cost.empty(original, job.trust_remote_code, models.loaded_dtype(job.dtype))
        teacher = sum(p.numel() * p.element_size() for p in held.parameters())
        note = "; ".join(filter(None, [note, "of the teacher's pass, its logits are counted"]))
    libraries = _libraries() if _on_cpu() else 0
    above: int | None = None
    try:
        # beside the weights: a pass with the optimizer's moments, which the first step alone does without
        above = max(_above(job, config, checkpoints) - gradients, 0)
    except Exception as error:  # whatever a class says that cannot run without storage; the record tells it
        why = " ".join(str(error).split())[:200]
        note = f"{name} does not run on shapes alone, so its activations are not known: {why}"
    known = weights + gradients + optimizer + teacher + libraries
    return Memory(
        arm=job.arm,
        method=job.recipe.method,
        rows=int(job.setting("per_device_train_batch_size")),
        tokens=job.longest,
        checkpointing=checkpoints,
        dtype=settings.weights_dtype(job),
        trained_params=sum(p.numel() for p in trained),
        weights=weights,
        gradients=gradients,
        optimizer=optimizer,
        teacher=teacher,
        libraries=libraries,
        activations=above,
        total=None if above is None else known + above,
        free=models.free_memory(),
        note=note,
    )


def _loaded(job: Job, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device, in the type of `trainers.load`, with the head of its trainer."""
    model = cost.empty(config, job.trust_remote_code, settings.weights_dtype(job))
    if job.arm not in TAUGHT:
        settings.fuse_head(model)
    return model


def _above(job: Job, config: PreTrainedConfig, checkpoints: bool) -> int:
    """The most bytes beside the weights and the optimizer's moments in a step.

    Where all blocks are alike, few are run: each further one keeps as much as the one before.
    """
    _, blocks = cost.by_block(config, job.trust_remote_code)
    depth = len(blocks)
    if len(set(blocks)) > 1 or depth <= FEW[1] or job.recipe.scope != "all":
        return _peak(job, config, checkpoints)
    few, more = (_peak(job, cost.cut(config, range(n)), checkpoints) for n in FEW)
    return more + (depth - FEW[1]) * (more - few) // (FEW[1] - FEW[0])


def _on_cpu() -> bool:
    return models.device().type == "cpu"


def _spared_by_4_bits(model: PreTrainedModel) -> int:
    """Bytes that 4-bit storage spares: of every linear layer but the head."""
    from torch import nn

    head = model.get_output_embeddings()
    linear = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    return round(sum(w.numel() * (w.element_size() - NF4) for w in linear))


def _optimizer(job: Job, trained: list[nn.Parameter]) -> tuple[int, str]:
    """Bytes of Adam's two moments, and what there is to say of another optimizer."""
    name = str(job.recipe.sft.get("optim", "adamw_torch"))
    if "8bit" in name:
        return 2 * sum(p.numel() for p in trained), ""
    note = "" if "adam" in name else f"{name} is counted as Adam, with two moments per weight"
    return 2 * sum(p.numel() * p.element_size() for p in trained), note


def _own_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    import torch

    seen = torch.ones_like(ids)
    return model(input_ids=ids, attention_mask=seen, labels=ids, use_cache=False, fused_lm_head=True).loss


def _taught_loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Towards a teacher's logits, as GKDTrainer computes it: all logits of both at once."""
    import torch

    _, kind = settings.gkd()
    mine = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits  # [B, T, V]
    theirs = torch.empty_like(mine, requires_grad=False)
    return kind.generalized_jsd_loss(mine[:, :-1], theirs[:, :-1], None, beta=settings.KD["beta"])


def _peak(job: Job, config: PreTrainedConfig, checkpoints: bool) -> int:
    """The most bytes beside the weights in a forward and a backward pass, or with all gradients, after them."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = settings.adapted(job, _loaded(job, config), checkpoints)
    loss = _taught_loss if job.arm in TAUGHT else _own_loss
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.has_bf16())
    with models.quiet(), FakeTensorMode(allow_non_fake_inputs=True):
        _without_storage(model)
        ids = torch.zeros(int(job.setting("per_device_train_batch_size")), job.longest, dtype=torch.long)  # [B, T]
        with _live([*model.parameters(), *model.buffers()]) as watch, autocast:
            loss(model, ids).backward()
    return watch.peak


def _without_storage(model: nn.Module) -> None:
    """From the meta device to fake tensors of the CPU, whose kernels an operation then chooses. Tied ones stay tied."""
    import torch
    from torch import nn

    made: dict[int, tuple[Any, Any]] = {}  # with the old one, so that its id is not given again
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, old in held.items():
                if old is not None and id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    trained = isinstance(old, nn.Parameter)
                    made[id(old)] = (nn.Parameter(new, requires_grad=old.requires_grad) if trained else new, old)
                if old is not None:
                    held[name] = made[id(old)][0]


def _live(known: list[torch.Tensor]) -> Any:
    """A mode under which the storages that operations make are counted for as long as they live."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Live(TorchDispatchMode):
        live = peak = 0

        def __init__(self) -> None:
            super().__init__()
            self.weights = {t.untyped_storage()._cdata for t in known}
            self.seen: dict[int, Any] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    self._count(tensor.untyped_storage())
            return out

        def _count(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key in self.weights or key in self.seen:
                return

            def freed(_: Any) -> None:
                self.live -= size
                self.seen.pop(key, None)

            self.seen[key] = weakref.ref(storage, freed)
            self.live += size
            self.peak = max(self.peak, self.live)

    return Live()


def _libraries() -> int:
    """Resident memory of this process, which has imported what a training imports and holds no weights."""
    import peft
    import psutil
    import trl

    assert trl.SFTTrainer and peft.PeftModel  # imported at last: both packages load their parts when they are asked for
    return int(psutil.Process().memory_info().rss)
