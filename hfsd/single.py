"""Single stages without a recipe, for what a user does by hand: `hfsd scan`, `hfsd prune`, `hfsd merge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from hfsd import chat, data, fetch, models, processes, surgery
from hfsd import merge as merging
from hfsd import prune as pruning
from hfsd import scan as scanning
from hfsd.blocks_cut import Data, Model, Prune
from hfsd.errors import BadRequest
from hfsd.recipe import Recipe
from hfsd.records import Checkpoint, MergeReport, PrunePlan, Scan
from hfsd.rundir import new_folder


def scan(recipe: Recipe, out: Path | None = None) -> Scan | None:
    """Scores every range on the text of `recipe.data` and chooses `recipe.prune.blocks` blocks to remove.

    Every process of a launcher takes part.

    Args:
        out: gets scores.json, pictures and, where blocks are to be chosen, scan.json; None: nothing is written.

    Returns:
        The scan; None where `recipe.prune.blocks` is 0: then the ranges are scored and nothing is chosen.
    """
    source = fetch.resolve(recipe.model)
    passages = data.passages(recipe.data[0])
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
    source = fetch.resolve(model)
    plan = plan or surgery.plan_by_hand(models.depth(source.folder), asked)
    return pruning.run(source.folder, source.ref, plan, out, asked.check, model.trust_remote_code, asked.max_shard_size)


def merge(
    names: Sequence[str],
    out: Path,
    method: str = "slerp",
    t: Sequence[float] = (0.5,),
    held_out: str | None = None,
    rows: int = 64,
    base: str | None = None,
    parameters: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Writes the merge of models of one cut to the new folder `out`.

    Args:
        names: Hub ids or folders; what is not weights comes from the first.
        held_out: data that no model was trained on; its first `rows` rows score each merge.

    Raises:
        BadRequest: `out` is there already, or as `hfsd.merge.run`.
    """
    if out.exists():
        raise BadRequest(f"{out} is there already; give another --out, or remove it first")
    if twice := next((n for n in names if names.count(n) > 1), None):
        raise BadRequest(f"{twice} is given twice; a model merged with itself is that model")
    if base is not None and not merging.takes_base(method):
        raise BadRequest(f"--method {method} takes no base; leave --base out")
    parts = {name: fetch.resolve(Model(path=name)).folder for name in names}
    origin = fetch.resolve(Model(path=base)).folder if base else None
    score = None
    if held_out is not None:
        examples = data.load(Data(source=held_out, pool=rows, streaming=True))[:rows]
        tokenizer = models.load_tokenizer(next(iter(parts.values())), trust_remote_code)
        score = merging.loss_on([(chat.asked(e), e.reference) for e in examples], tokenizer)
    return merging.run(parts, out, method, t, score, origin, parameters, trust_remote_code)
