"""Original, cut and adapters on one set of weights. The only place where adapters are loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from hfsd import models, surgery
from hfsd.errors import BadRequest

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel


class Family:
    """The variants of one original. Memory: the original, plus the adapters, plus one whole checkpoint where in use.

    Args:
        original: the unpruned model; it is never changed.
        kept: indices of the blocks that the pruned model keeps, in the original's numbering.
        adapters: variant id -> folder of a PEFT adapter trained on the pruned model.
        checkpoints: variant id -> folder of a checkpoint that is no adapter: every weight trained, or merged.
    """

    def __init__(
        self,
        original: PreTrainedModel,
        kept: Sequence[int],
        adapters: Mapping[str, Path],
        checkpoints: Mapping[str, Path] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.original = original
        self.pruned: PreTrainedModel = surgery.view(original, kept)
        self.arms: PeftModel | None = None
        self.checkpoints = dict(checkpoints or {})
        self._remote = trust_remote_code
        self._whole: tuple[str, PreTrainedModel] | None = None
        for name, folder in adapters.items():
            self._add(name, folder)

    @property
    def ids(self) -> list[str]:
        """Variant ids: original, pruned, then the arms as they were given, adapters first."""
        return ["original", "pruned", *(self.arms.peft_config if self.arms else ()), *self.checkpoints]

    def params(self, variant: str) -> int:
        """Parameters of a variant once merged: an arm has those of the pruned model."""
        if variant == "original":
            return models.count_params(self.original)
        adapters = sum(p.numel() for n, p in self.pruned.named_parameters() if "lora_" in n)
        return models.count_params(self.pruned) - adapters

    @contextmanager
    def use(self, variant: str) -> Iterator[PreTrainedModel | PeftModel]:
        """A variant, ready to run, until the block ends. One at a time: the arms share their base's modules."""
        if variant not in self.ids:
            raise BadRequest(f"no variant '{variant}' here; there are {', '.join(self.ids)}")
        if variant == "original":
            yield self.original
        elif variant in self.checkpoints:
            yield self._loaded(variant)
        elif self.arms is None:
            yield self.pruned
        elif variant == "pruned":
            with self.arms.disable_adapter():
                yield self.arms
        else:
            self.arms.set_adapter(variant)
            yield self.arms

    def let_go(self) -> None:
        """Lets the whole checkpoint go that was used last, for somebody who needs its memory."""
        self._whole = None

    def _loaded(self, variant: str) -> PreTrainedModel:
        """A whole checkpoint, in the original's type; the one used before is let go."""
        if self._whole is None or self._whole[0] != variant:
            self._whole = None
            dtype = str(self.original.dtype).removeprefix("torch.")
            self._whole = (variant, models.load(self.checkpoints[variant], dtype, self._remote))
        return self._whole[1]

    def _add(self, name: str, folder: Path) -> None:
        from peft import PeftModel

        if not (folder / "adapter_config.json").is_file():
            raise BadRequest(f"{folder}: no adapter_config.json; give the folder of a PEFT adapter")
        try:
            if self.arms is None:
                self.arms = PeftModel.from_pretrained(self.pruned, folder, adapter_name=name)
            else:
                self.arms.load_adapter(folder, adapter_name=name)
        except (ValueError, RuntimeError, KeyError) as error:
            raise BadRequest(
                f"adapter {folder} does not fit the pruned model: {' '.join(str(error).split())[:200]}"
            ) from error
        self.arms.eval()
