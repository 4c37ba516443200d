"""What each step of a run does: the stage's function called with what the session and the recipe give it."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import yaml

from hfsd import chat, data, models, original_card, processes, recipes, surgery
from hfsd.blocks_cut import Data
from hfsd.findings import EvalRow
from hfsd.plain import dumps, from_json, load
from hfsd.records import CONFIGS, TEXTS, MergeReport, Scan, TrainReport, TrainSet, Variant
from hfsd.rundir import DONE, Stage, append_log, git_state, merged_folder, package_versions, read_json, write_atomic
from hfsd.session import Session

SCORE_ROWS = 64  # rows kept for calibration on which merges are told apart


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
    """One variant on every task; finished tasks are not run again. Every process of a launcher takes its share."""
    from hfsd import evaluate as stages
    from hfsd import taskdata

    asked, variant, first = work.recipe.evaluate, _variant(work, stage), processes.rank() == 0
    docs = work.root / "evaluate" / "documents"
    if first and any(t == "demo" or t.startswith("demo_") for t in asked.tasks):
        taskdata.write(taskdata.build(work.held_out, asked.limit, asked.seed), docs)
    processes.wait()
    tokenizer = models.load_tokenizer(work.folder_of(variant), work.recipe.model.trust_remote_code)
    with ExitStack() as held:
        if asked.engine == "transformers":

            def backend() -> Any:
                return stages.in_process(held.enter_context(work.family.use(variant.id)), tokenizer, asked.batch_tokens)
        else:
            backend = work.backend_elsewhere(variant)
        rows = stages.run(backend, tokenizer, variant, work.tasks, stage.path)
    if first:
        write_atomic(stage.path / "scores.json", dumps(rows))
    return {}


def compare(work: Session, stage: Stage) -> dict[str, Any]:
    """answers.jsonl, shift.json, drafts.json and cost.json."""
    from hfsd import compare as stages

    asked, model = work.recipe.compare, work.recipe.model
    folders = {v.id: work.folder_of(v) for v in work.variants}
    checkpoints = stages.Checkpoints(folders, model.dtype, model.trust_remote_code, model.device_map)
    drafts = stages.run(work.family, work.tokenizer, work.held_out, work.variants, asked, checkpoints, stage.path)
    work.release()  # a model is weighed alone
    stages.weigh(checkpoints, stage.path)
    for draft in drafts:
        if draft.refused:
            append_log(work.root, f"{stage.name}: no shift and no draft use of {draft.variant.id}: {draft.refused}")
    return {}


def report(work: Session, stage: Stage) -> dict[str, Any]:
    """results.json, index.html, report.md and pictures."""
    from hfsd import compare as comparing
    from hfsd import documents
    from hfsd import report as stages

    root, cut = work.root, work.checkpoint
    compared, rows = comparing.read(root / "compare"), scores(root, work.variants)
    scanned = root / "scan" / "scan.json"
    results = stages.summarise(
        name=work.recipe.name,
        recipe=yaml.safe_dump(recipes.dump(work.recipe), sort_keys=False, allow_unicode=True),
        original=work.source.ref,
        params={v.id: cut.original_params if v.arm == "original" else cut.params for v in work.variants},
        plan=cut.plan,
        scan=load(Scan, scanned) if scanned.is_file() and work.recipe.prune.blocks else None,
        rows=rows,
        documents=documents.read(root, rows),
        shifts=compared.shifts,
        drafts=compared.drafts,
        costs=compared.costs,
        train_sets={
            d.label: load(TrainSet, root / work.recipe.rewrite_step(d.label) / "stats.json") for d in work.recipe.data
        },
        training=[load(TrainReport, root / "train" / v.id / "train.json") for v in work.variants if v.arm in TEXTS],
        merges={
            v.id: load(MergeReport, root / "merge" / v.id / "merge.json") for v in work.variants if v.arm == "merged"
        },
        stage_seconds=stage_seconds(root, list(stage.inputs)),
        matmul_flop_cut=cut.matmul_flop_cut,
        param_cut=1 - cut.params / cut.original_params,
        facts=_card_facts(work),
    )
    stages.write(results, compared.answers, stage.path)
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


def stage_seconds(root: Path, steps: Sequence[str]) -> dict[str, float]:
    """Wall time of finished steps, by the name of each, from its marker: that of the process that finished it."""
    return {name: float(read_json(root / name / DONE)["seconds"]) for name in steps}


def _card_facts(work: Session) -> dict[str, Any]:
    """What the cards state besides the results. What is not known is left out, never made up."""
    recipe, source = work.recipe, work.source
    licenses = {d.license for d in recipe.data}
    readme = source.folder / "README.md"
    said = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    carried = original_card.facts(said, source.ref if source.on_hub else None, recipe.model.license)
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
        "packages": package_versions(),
        "git": git_state(),
    }
    return carried | {k: v for k, v in facts.items() if v is not None}


def _label(work: Session, stage: Stage) -> str:
    """The data set of a rewriting step."""
    labels = [d.label for d in work.recipe.data]
    return labels[0] if len(labels) == 1 else stage.path.name


def _variant(work: Session, stage: Stage) -> Variant:
    return next(v for v in work.variants if v.id == stage.path.name)
