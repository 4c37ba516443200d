"""Single stages without a recipe, for what a user does by hand: `hfsd scan MODEL ...`, `hfsd prune MODEL ...`."""

from __future__ import annotations

from pathlib import Path

from hfsd import data, models, surgery
from hfsd import prune as pruning
from hfsd import scan as scanning
from hfsd.errors import BadRequest
from hfsd.recipe import Data, Model
from hfsd.recipe import Scan as ScanRecipe
from hfsd.records import Checkpoint, PrunePlan, Scan, dumps
from hfsd.rundir import write_atomic


def scan(model: Model, calibration: Data, blocks: int, recipe: ScanRecipe, out: Path | None = None) -> Scan:
    """Scores every range on a calibration source and chooses `blocks` blocks to remove.

    Args:
        out: gets scan.json and scores.json; None: nothing is written.
    """
    source = models.resolve(model)
    rows = data.split(data.load(calibration), calibration).calibration
    loaded = models.load(source.folder, model.dtype, model.trust_remote_code)
    tokenizer = models.load_tokenizer(source.folder, model.trust_remote_code)
    found = scanning.run(loaded, tokenizer, rows, recipe, blocks, source.ref)
    if out is not None:
        write_atomic(out / "scan.json", dumps(found))
        write_atomic(out / "scores.json", dumps(found.scores[recipe.tokens]))
    return found


def prune(model: Model, out: Path, remove: tuple[int, int] | PrunePlan, check: str = "auto") -> Checkpoint:
    """Writes the checkpoint without a range of blocks (0-based, half-open), or by a plan, to the new folder `out`.

    Raises:
        BadRequest: `out` is there already, or the range does not fit.
    """
    if out.exists():
        raise BadRequest(f"{out} is there already; give another --out, or remove it first")
    source = models.resolve(model)
    plan = (
        remove
        if isinstance(remove, PrunePlan)
        else surgery.plan_removing(models.depth(source.folder), *remove, why="by hand")
    )
    return pruning.run(source.folder, source.ref, plan, out, check, model.trust_remote_code)
