"""What each step of a run does, with what the steps share: the original, its tokenizer, the rows, one family.

Nothing is loaded before a step asks for it, and the original is let go while the arms train.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hfsd import chat, data, fetch, models, processes, recipes, surgery
from hfsd.plain import dumps, from_json, load
from hfsd.recipe import Data, Recipe
from hfsd.records import (
    CONFIGS,
    TEXTS,
    Checkpoint,
    EvalRow,
    Example,
    MergeReport,
    Scan,
    TrainReport,
    TrainSet,
    Variant,
)
from hfsd.rundir import DONE, Stage, append_log, merged_folder, read_json, write_atomic

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from hfsd.family import Family


SCORE_ROWS = 64  # rows kept for calibration on which merges are told apart


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


def scan(work: Session, stage: Stage) -> dict[str, Any]:
    """scan.json (everything), scores.json (the chosen scores alone), and pictures of both."""
    from hfsd import scan as stages

    asked = work.recipe.scan
    blocks = work.recipe.prune.blocks or 0
    if asked.calibration is None:
        passages: list[data.Passage] = [chat.conversation(e) for e in work.calibration]
    else:
        passages = data.passages(Data(source=asked.calibration, seed=work.recipe.data[0].seed))
    found = stages.run(work.original, work.tokenizer, passages, asked, blocks, work.source.ref)
    if processes.rank() == 0:
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

    asked, rows = work.recipe.rewrite, work.splits[_label(work, stage)]

    def engine() -> engines.Engine:
        if asked.endpoint is not None:
            source = work.source
            names = (str(source.folder), source.ref.repo, source.ref.revision)
            return endpoint.Remote(asked.endpoint, work.recipe.model.path, names)
        if asked.engine == "vllm":
            return vllm_engine.InProcess(work.source.folder, asked.tensor_parallel, work.recipe.model)
        return engines.Transformers(work.original, work.tokenizer, asked.batch_tokens)

    ref = work.source.ref
    model = f"{ref.repo}@{ref.revision}" if ref.revision else ref.repo
    stages.run(engine, rows.train, rows.calibration, asked, stage.key, stage.path, model)
    return {}


def train(work: Session, stage: Stage) -> dict[str, Any]:
    """One arm: adapter/, merged/, losses.jsonl, train.json."""
    from hfsd import train as stages

    work.release()
    variant, asked, cut, model = _variant(work, stage), work.recipe.train, work.checkpoint, work.recipe.model
    folder = work.root / "prune" / cut.path
    pruned = stages.Pruned(folder, cut.plan, cut.sha256, model.dtype, model.trust_remote_code)
    given = asked.adapter_from.get(variant.arm)
    if given is None:
        rewritten = work.root / work.recipe.rewrite_step(str(variant.data))
        rows = {text: rewritten / f"{text}.parquet" for text in CONFIGS}
        made = stages.run(pruned, rows, variant, asked, stage.path, work.load_original)
        if processes.rank() == 0:
            append_log(work.root, f"{stage.name}: {made.engine}")
        return {"train_seeds": asked.seeds, "engine": made.engine}
    if processes.rank() == 0:
        stages.adopt(Path(given), pruned, variant, stage.path)
    return {"train_seeds": asked.seeds}


def merge(work: Session, stage: Stage) -> dict[str, Any]:
    """merged/ of several arms, and merge.json."""
    from hfsd import merge as stages

    asked, variant = work.recipe.merge, _variant(work, stage)
    assert asked is not None
    work.release()
    ids = [Variant(asked.arm, name, variant.seed).id for name in asked.of]
    parts = {i: merged_folder(work.root, i) for i in ids}
    base = work.root / "prune" / work.checkpoint.path
    score = None
    if len(asked.t) > 1:  # a single one needs no rows, and none are read
        answers = [(chat.asked(e), e.reference) for e in work.calibration[:SCORE_ROWS]]
        score = stages.loss_on(answers, work.tokenizer)
    made = stages.run(
        parts, stage.path / "merged", asked.method, asked.t, score, base, None, work.recipe.model.trust_remote_code
    )
    write_atomic(stage.path / "merge.json", dumps(made))
    return {}


def evaluate(work: Session, stage: Stage) -> dict[str, Any]:
    """One variant on every task; finished tasks are not run again."""
    from hfsd import evaluate as stages
    from hfsd import taskdata

    asked, variant = work.recipe.evaluate, _variant(work, stage)
    docs = work.root / "evaluate" / "documents"
    if "demo" in asked.tasks or any(t.startswith("demo_") for t in asked.tasks):
        taskdata.write(taskdata.build(work.held_out, asked.limit, asked.seed), docs)
    with work.family.use(variant.id) as model:
        rows = stages.run(model, work.tokenizer, variant, asked, docs, stage.path)
    write_atomic(stage.path / "scores.json", dumps(rows))
    return {}


def compare(work: Session, stage: Stage) -> dict[str, Any]:
    """shift.json and answers.jsonl."""
    from hfsd import compare as stages

    stages.run(work.family, work.tokenizer, work.held_out, work.variants, work.recipe.compare, stage.path)
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
        train_sets={
            d.label: load(TrainSet, root / work.recipe.rewrite_step(d.label) / "stats.json") for d in work.recipe.data
        },
        training=[load(TrainReport, root / "train" / v.id / "train.json") for v in work.variants if v.arm in TEXTS],
        merges={
            v.id: load(MergeReport, root / "merge" / v.id / "merge.json") for v in work.variants if v.arm == "merged"
        },
        stage_seconds=stage_seconds(root, [v.id for v in work.variants]),
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


def stage_seconds(root: Path, variants: Sequence[str]) -> dict[str, float]:
    """Wall time of every finished step, from the markers; not of variants that the recipe no longer has."""
    found = {}
    for marker in sorted(root.rglob(DONE)):
        stage, _, name = marker.parent.relative_to(root).as_posix().partition("/")
        if stage not in ("train", "merge", "evaluate") or name in variants:
            found[f"{stage}/{name}".rstrip("/")] = float(read_json(marker)["seconds"])
    return found


def _card_facts(work: Session) -> dict[str, Any]:
    """What the cards state besides the results. What is not known is left out, never made up."""
    recipe, source = work.recipe, work.source
    licenses = {d.license for d in recipe.data}
    data_files = {f"{d.label}-{text}": f"{d.label}-{text}.parquet" for d in recipe.data for text in reversed(CONFIGS)}
    facts = {
        "license": recipe.model.license,
        "source": None if source.on_hub else source.ref.repo,
        "quantization": source.note or None,
        "data_source": " and ".join(d.source for d in recipe.data),
        "data_commits": {s: c for s, c in work.data_commits.items() if c} or None,
        "data_files": data_files if len(recipe.data) > 1 else None,
        "data_license": licenses.pop() if len(licenses) == 1 else None,
        "data_repos": [d.source for d in recipe.data if data.is_hub(d.source)] or None,
        "machine": f"{models.device()}, {os.cpu_count()} cores, {platform.machine()}",
        "trust_remote_code": recipe.model.trust_remote_code or None,
    }
    return {k: v for k, v in facts.items() if v is not None}


def _in_turn(rows: Sequence[Sequence[Example]]) -> list[Example]:
    """The first row of each, the second row of each, and so on."""
    return [row for round_ in zip_longest(*rows) for row in round_ if row is not None]


def _label(work: Session, stage: Stage) -> str:
    """The data set of a rewriting step."""
    labels = [d.label for d in work.recipe.data]
    return labels[0] if len(labels) == 1 else stage.path.name


def _variant(work: Session, stage: Stage) -> Variant:
    return next(v for v in work.variants if v.id == stage.path.name)
