"""Single stages without a recipe, for what a user does by hand: `hfsd scan MODEL ...`, `hfsd prune MODEL ...`."""

from __future__ import annotations

from pathlib import Path

from hfsd import data, models, processes, surgery
from hfsd import prune as pruning
from hfsd import scan as scanning
from hfsd.errors import BadRequest
from hfsd.recipe import Model, Prune, Recipe
from hfsd.records import Checkpoint, PrunePlan, Scan
from hfsd.rundir import new_folder


def scan(recipe: Recipe, out: Path | None = None) -> Scan | None:
    """Scores every range on the text of `recipe.data` and chooses `recipe.prune.blocks` blocks to remove.

    Every process of a launcher takes part.

    Args:
        out: gets scores.json, pictures and, where blocks are to be chosen, scan.json; None: nothing is written.

    Returns:
        The scan; None where `recipe.prune.blocks` is 0: then the ranges are scored and nothing is chosen.
    """
    source = models.resolve(recipe.model)
    passages = data.passages(recipe.data)
    asked = recipe.model
    loaded = models.load(source.folder, asked.dtype, asked.trust_remote_code, asked.device_map)
    tokenizer = models.load_tokenizer(source.folder, asked.trust_remote_code)
    found = None
    if recipe.prune.blocks:
        found = scanning.run(loaded, tokenizer, passages, recipe.scan, recipe.prune.blocks, source.ref)
    scores = found.scores if found else scanning.scores_only(loaded, tokenizer, passages, recipe.scan)
    if out is not None and processes.rank() == 0:
        with new_folder(out) as target:
            scanning.write(scores, recipe.scan.tokens, target, found)
    return found


def prune(model: Model, out: Path, asked: Prune, plan: PrunePlan | None = None) -> Checkpoint:
    """Writes the checkpoint without some blocks to the new folder `out`.

    Args:
        asked: which blocks, where no plan is given, and how to write and check.
        plan: a scan's choice.

    Raises:
        BadRequest: `out` is there already, or the blocks do not fit.
    """
    if out.exists():
        raise BadRequest(f"{out} is there already; give another --out, or remove it first")
    source = models.resolve(model)
    plan = plan or surgery.plan_by_hand(models.depth(source.folder), asked)
    return pruning.run(source.folder, source.ref, plan, out, asked.check, model.trust_remote_code, asked.max_shard_size)
