"""What the steps of a run share: the original, its tokenizer, the rows, the tasks, one family of variants.

Nothing is loaded before a step asks for it, and the original is let go while the arms train.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import data, fetch, models, processes
from hfsd.errors import BadRequest
from hfsd.plain import load
from hfsd.recipe import Recipe
from hfsd.records import Checkpoint, Example, Variant
from hfsd.rundir import DONE, merged_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfsd.family import Family
    from hfsd.harness import Tasks


class Session:
    """One process working on one run."""

    def __init__(self, recipe: Recipe, root: Path, variants: list[Variant]) -> None:
        self.recipe, self.root, self.variants = recipe, root, variants
        self._original: PreTrainedModel | None = None
        self._family: Family | None = None

    @cached_property
    def source(self) -> fetch.Source:
        return fetch.resolve(self.recipe.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return models.load_tokenizer(self.source.folder, self.recipe.model.trust_remote_code)

    @cached_property
    def splits(self) -> dict[str, data.Splits]:
        """Per data set."""
        return {d.label: data.split(data.load(d), d) for d in self.recipe.data}

    @cached_property
    def data_commits(self) -> dict[str, str | None]:
        """Source -> its Hub commit, where it is on the Hub."""
        return {d.source: data.commit(d) for d in self.recipe.data}

    @property
    def calibration(self) -> list[Example]:
        """Rows kept for scoring blocks and merges, those of several data sets in turn."""
        return _in_turn([s.calibration for s in self.splits.values()])

    @property
    def held_out(self) -> list[Example]:
        """Rows kept for measuring variants, those of several data sets in turn."""
        return _in_turn([s.held_out for s in self.splits.values()])

    @property
    def original(self) -> PreTrainedModel:
        if self._original is None:
            self._original = self.load_original()
        return self._original

    def load_original(self) -> PreTrainedModel:
        """The original, which the caller lets go."""
        model = self.recipe.model
        return models.load(self.source.folder, model.dtype, model.trust_remote_code, model.device_map)

    @property
    def family(self) -> Family:
        """Original, pruned and every arm on one set of weights."""
        from hfsd.family import Family

        if self._family is None:
            arms = [v.id for v in self.variants[2:]]
            adapters = {i: self.root / "train" / i / "adapter" for i in arms}
            adapters = {i: folder for i, folder in adapters.items() if folder.is_dir()}
            whole = {i: merged_folder(self.root, i) for i in arms if i not in adapters}
            remote = self.recipe.model.trust_remote_code
            self._family = Family(self.original, self.checkpoint.plan.kept, adapters, whole, remote)
        return self._family

    @property
    def checkpoint(self) -> Checkpoint:
        return load(Checkpoint, self.root / "prune" / "prune.json")

    def folder_of(self, variant: Variant) -> Path:
        """The stock checkpoint of a variant, with its own tokenizer."""
        if variant.arm == "original":
            return self.source.folder
        if variant.arm == "pruned":
            return self.root / "prune" / self.checkpoint.path
        return merged_folder(self.root, variant.id)

    @cached_property
    def tasks(self) -> Tasks:
        """The tasks of the evaluation, loaded once for all variants."""
        from hfsd.harness import Tasks

        return Tasks(self.recipe.evaluate, self.root / "evaluate" / "documents")

    @cached_property
    def servers(self) -> dict[str, Any]:
        """The servers of all variants that are still to be evaluated, looked at before the first of them is asked."""
        from hfsd import served

        left = [v for v in self.variants if not (self.root / "evaluate" / v.id / DONE).is_file()]
        names = {v.id: self.recipe.model.path if v.arm == "original" else str(self.folder_of(v)) for v in left}
        return served.servers(self.recipe.evaluate.endpoint, names)

    def backend_elsewhere(self, variant: Variant) -> Callable[[], Any]:
        """Makes lm-eval's model of a variant that another engine runs.

        Raises:
            BadRequest: of several processes, or without its server.
        """
        from hfsd import served

        asked, model, folder = self.recipe.evaluate, self.recipe.model, self.folder_of(variant)
        if processes.count() > 1:
            raise BadRequest(
                f"evaluate.engine: {asked.engine} spreads its work itself; go on without the launcher: hfsd eval"
            )
        self.release()  # an engine in this process needs the memory
        if asked.engine == "vllm":
            return lambda: served.vllm(folder, model, asked.tensor_parallel, asked.seed)
        server = self.servers[variant.id]
        return lambda: served.Completions(server, folder, model.trust_remote_code)

    def release(self) -> None:
        """Lets the original go, so that training does not pay for it."""
        self._original = self._family = None
        gc.collect()

    def facts(self) -> dict[str, Any]:
        """Provenance of every marker."""
        return {
            "model": self.source.ref,
            "device": str(models.device()),
            "data": {
                d.label: {"source": d.source, "revision": self.data_commits[d.source] or d.revision, "seed": d.seed}
                for d in self.recipe.data
            },
        }


def _in_turn(rows: Sequence[Sequence[Example]]) -> list[Example]:
    """The first row of each, the second row of each, and so on."""
    return [row for round_ in zip_longest(*rows) for row in round_ if row is not None]
