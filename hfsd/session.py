"""What each step of a run does, with what the steps share: the original, its tokenizer, the rows, one family.

Nothing is loaded before a step asks for it, and the original is let go while the arms train.
"""

from __future__ import annotations

import gc
import os
import platform
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfsd import chat, data, models, recipes, surgery
from hfsd.recipe import Data, Recipe
from hfsd.records import CONFIGS, Checkpoint, EvalRow, Scan, TrainReport, TrainSet, Variant, dumps, from_json, load
from hfsd.rundir import DONE, Stage, read_json, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfsd.family import Family


class Session:
    """One process working on one run."""

    def __init__(self, recipe: Recipe, root: Path, variants: list[Variant]) -> None:
        self.recipe, self.root, self.variants = recipe, root, variants
        self._original: PreTrainedModel | None = None
        self._family: Family | None = None

    @cached_property
    def source(self) -> models.Source:
        return models.resolve(self.recipe.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return models.load_tokenizer(self.source.folder, self.recipe.model.trust_remote_code)

    @cached_property
    def splits(self) -> data.Splits:
        return data.split(data.load(self.recipe.data), self.recipe.data)

    @property
    def original(self) -> PreTrainedModel:
        if self._original is None:
            model = self.recipe.model
            self._original = models.load(self.source.folder, model.dtype, model.trust_remote_code, model.device_map)
        return self._original

    @property
    def family(self) -> Family:
        """Original, pruned and every arm on one set of weights."""
        from hfsd.family import Family

        if self._family is None:
            adapters = {v.id: self.root / "train" / v.id / "adapter" for v in self.variants[2:]}
            self._family = Family(self.original, self.checkpoint.plan.kept, adapters)
        return self._family

    @property
    def checkpoint(self) -> Checkpoint:
        return load(Checkpoint, self.root / "prune" / "prune.json")

    def release(self) -> None:
        """Lets the original go, so that training does not pay for it."""
        self._original = self._family = None
        gc.collect()

    def facts(self) -> dict[str, Any]:
        """Provenance of every marker."""
        return {
            "model": self.source.ref,
            "device": str(models.device()),
            "data": {"source": self.recipe.data.source, "revision": self.recipe.data.revision},
            "seed": self.recipe.data.seed,
        }


def scan(work: Session, stage: Stage) -> dict[str, Any]:
    """scan.json (everything), scores.json (the chosen scores alone), and pictures of both."""
    from hfsd import scan as stages

    asked = work.recipe.scan
    blocks = work.recipe.prune.blocks or 0
    if asked.calibration is None:
        passages: list[data.Passage] = [chat.conversation(e) for e in work.splits.calibration]
    else:
        passages = data.passages(Data(source=asked.calibration, seed=work.recipe.data.seed))
    found = stages.run(work.original, work.tokenizer, passages, asked, blocks, work.source.ref)
    stages.write(found.scores, asked.tokens, stage.path, found)
    print(found.plan.sentence)
    return {}


def prune(work: Session, stage: Stage) -> dict[str, Any]:
    """checkpoint/ and prune.json."""
    from hfsd import prune as stages

    asked, source, remote = work.recipe.prune, work.source, work.recipe.model.trust_remote_code
    out = stage.path / "checkpoint"
    if asked.from_ is not None:
        made = stages.adopt(source.folder, Path(asked.from_), out, asked.check, remote)
    else:
        if asked.blocks:
            plan = load(Scan, work.root / "scan" / "scan.json").plan
        else:
            plan = surgery.plan_by_hand(models.depth(source.folder), asked)
        made = stages.run(source.folder, source.ref, plan, out, asked.check, remote, asked.max_shard_size)
    write_atomic(stage.path / "prune.json", dumps(made))
    return {}


def rewrite(work: Session, stage: Stage) -> dict[str, Any]:
    """rewrites.jsonl, one parquet file per arm, stats.json."""
    from hfsd import endpoint, engines, vllm_engine
    from hfsd import rewrite as stages

    asked = work.recipe.rewrite

    def engine() -> engines.Engine:
        if asked.endpoint is not None:
            return endpoint.Remote(asked.endpoint, work.recipe.model.path)
        if asked.engine == "vllm":
            return vllm_engine.InProcess(work.source.folder, asked.tensor_parallel, work.recipe.model)
        return engines.Transformers(work.original, work.tokenizer, asked.batch_tokens)

    stages.run(engine, work.splits.train, work.splits.calibration, asked, stage.key, stage.path)
    return {}


def train(work: Session, stage: Stage) -> dict[str, Any]:
    """One arm: adapter/, merged/, losses.jsonl, train.json."""
    from hfsd import train as stages

    work.release()
    variant = _variant(work, stage)
    base = work.root / "prune" / work.checkpoint.path
    given = work.recipe.train.adapter_from.get(variant.arm)
    if given is not None:
        stages.adopt(Path(given), base, variant, stage.path)
    else:
        rows = {arm: work.root / "rewrite" / f"{config}.parquet" for arm, config in CONFIGS.items()}
        stages.run(base, rows, variant, work.recipe.train, stage.path, work.checkpoint.sha256)
    return {"train_seed": work.recipe.train.seed}


def evaluate(work: Session, stage: Stage) -> dict[str, Any]:
    """One variant on every task; finished tasks are not run again."""
    from hfsd import evaluate as stages
    from hfsd import taskdata

    asked, variant = work.recipe.evaluate, _variant(work, stage)
    docs = work.root / "evaluate" / "documents"
    if "demo" in asked.tasks or any(t.startswith("demo_") for t in asked.tasks):
        taskdata.write(taskdata.build(work.splits.held_out, asked.limit, asked.seed), docs)
    with work.family.use(variant.id) as model:
        rows = stages.run(model, work.tokenizer, variant, asked, docs, stage.path)
    write_atomic(stage.path / "scores.json", dumps(rows))
    return {}


def compare(work: Session, stage: Stage) -> dict[str, Any]:
    """shift.json and answers.jsonl."""
    from hfsd import compare as stages

    stages.run(work.family, work.tokenizer, work.splits.held_out, work.variants, work.recipe.compare, stage.path)
    return {}


def report(work: Session, stage: Stage) -> dict[str, Any]:
    """results.json, report.md and pictures."""
    from hfsd import compare as comparing
    from hfsd import report as stages

    root, cut = work.root, work.checkpoint
    shifts, answers = comparing.read(root / "compare")
    scanned = root / "scan" / "scan.json"
    results = stages.summarise(
        name=work.recipe.name,
        recipe=yaml.safe_dump(recipes.dump(work.recipe), sort_keys=False, allow_unicode=True),
        original=work.source.ref,
        params={v.id: cut.original_params if v.arm == "original" else cut.params for v in work.variants},
        plan=cut.plan,
        scan=load(Scan, scanned) if scanned.is_file() and work.recipe.prune.blocks else None,
        rows=scores(root, work.variants),
        shifts=shifts,
        train_sets={work.recipe.data_name: load(TrainSet, root / "rewrite" / "stats.json")},
        training=[load(TrainReport, root / "train" / v.id / "train.json") for v in work.variants[2:]],
        stage_seconds=stage_seconds(root),
        matmul_flop_cut=cut.matmul_flop_cut,
        param_cut=1 - cut.params / cut.original_params,
        facts=_card_facts(work),
    )
    stages.write(results, answers, stage.path)
    return {}


def publish(work: Session, stage: Stage) -> dict[str, Any]:
    """One folder per repo with exactly what an upload sends, and receipts.json."""
    from hfsd import publish as stages

    stages.run(work.recipe, work.root, work.source, stage.path)
    return {}


def scores(root: Path, variants: list[Variant]) -> list[EvalRow]:
    """The scores of all variants, task by task as they were evaluated."""
    found = [read_json(root / "evaluate" / v.id / "scores.json") for v in variants]
    return [from_json(EvalRow, row) for rows in found for row in rows]


def stage_seconds(root: Path) -> dict[str, float]:
    """Wall time of every finished step, from the markers."""
    markers = sorted(root.rglob(DONE))
    return {m.parent.relative_to(root).as_posix(): float(read_json(m)["seconds"]) for m in markers}


def _card_facts(work: Session) -> dict[str, Any]:
    """What the cards state besides the results. What is not known is left out, never made up."""
    recipe, source = work.recipe, work.source
    facts = {
        "license": recipe.model.license,
        "source": None if source.on_hub else source.ref.repo,
        "quantization": source.note or None,
        "data_source": recipe.data.source,
        "data_license": recipe.data.license,
        "data_repo": recipe.data.source if data.is_hub(recipe.data.source) else None,
        "machine": f"{models.device()}, {os.cpu_count()} cores, {platform.machine()}",
        "trust_remote_code": recipe.model.trust_remote_code or None,
    }
    return {k: v for k, v in facts.items() if v is not None}


def _variant(work: Session, stage: Stage) -> Variant:
    return next(v for v in work.variants if v.id == stage.path.name)
