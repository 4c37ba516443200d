"""Training against a plain TRL script on the same rows and settings; adapters behind the cut against all of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hfsd import chat, data, models, prune, recipes, schedule, surgery, train
from hfsd.blocks_cut import Prune
from hfsd.blocks_recovery import Train
from hfsd.records import CONFIGS, ModelRef, Variant
from tests.bench.conftest import Table, peak

pytestmark = [pytest.mark.bench, pytest.mark.timeout(5400)]
ROWS, BATCH, RATE = 64, 4, 3e-4
REMOVE = "12:16"  # in the middle: 14 of 26 blocks lie behind the cut

PLAIN = """
import json, sys, time
from pathlib import Path
def prepare():
    import torch, datasets, peft, trl, transformers
def work():
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer
    base, rows, out = sys.argv[1:4]
    settings = json.loads(sys.argv[4])
    args = SFTConfig(output_dir=out, num_train_epochs=1, train_sampling_strategy="sequential", shuffle_dataset=False,
        gradient_checkpointing=False, bf16=False, use_cpu=True, dataloader_pin_memory=False, lr_scheduler_type="cosine",
        warmup_steps=0.05, max_length=1024, logging_steps=1, report_to="none", save_strategy="steps", save_steps=25,
        seed=0, disable_tqdm=True, **settings)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="float32")
    trainer = SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(json.loads(Path(rows).read_text())),
        processing_class=AutoTokenizer.from_pretrained(base),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    trainer.model.save_pretrained(out + "/adapter")
    trainer.model.merge_and_unload().save_pretrained(out + "/merged")
    losses = [h["loss"] for h in trainer.state.log_history if "loss" in h]
    Path(out, "log.json").write_text(json.dumps([losses, seconds]))
"""
OURS = """
import json, sys
from pathlib import Path
def prepare():
    import torch, datasets, peft, trl, transformers
def work():
    from hfsd import progress, train
    from hfsd.blocks_recovery import Train
    from hfsd.records import CONFIGS, PrunePlan, Variant
    progress.quiet()
    base, folder, out = sys.argv[1:4]
    data = {text: Path(folder, f"{text}.parquet") for text in CONFIGS}
    plan = PrunePlan(30, (*range(12), *range(16, 30)), "")
    pruned, asked = train.Pruned(Path(base), plan, {}), Train(**json.loads(sys.argv[4]))
    made = train.run(pruned, data, Variant("sft", "d"), asked, Path(out), None)
    Path(out, "log.json").write_text(json.dumps([[v for _, v in made.losses], made.train_seconds]))
"""


@pytest.fixture(scope="module")
def base(demo_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    plan = surgery.plan_by_hand(30, Prune(remove=REMOVE))
    out = tmp_path_factory.mktemp("base") / "cut"
    prune.run(demo_folder, ModelRef("demo"), plan, out, "structure")
    return out


def _parquet(folder: Path, count: int) -> tuple[dict[str, Path], list]:
    """Reference rows under both names, and rows that are held out."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    recipe = recipes.load("demo")[0].data[0].model_copy(update={"rows": count})
    splits = data.split(data.load(recipe), recipe)
    rows = [
        {"id": e.id, "prompt": chat.asked(e), "completion": [{"role": "assistant", "content": e.reference}]}
        for e in splits.train
    ]
    for text in CONFIGS:
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{text}.parquet")
    return {text: folder / f"{text}.parquet" for text in CONFIGS}, splits.held_out


def test_training_is_as_fast_as_a_plain_script(base: Path, tmp_path: Path, table: Table) -> None:
    settings = {"per_device_train_batch_size": BATCH, "learning_rate": RATE}
    files, _ = _parquet(tmp_path, ROWS)
    rows = schedule.read(files, models.load_tokenizer(base), 1024)
    pace = schedule.Pace(BATCH, 1.0, -1, "group_by_length", "rows", 0)
    order = schedule.order(rows, pace)
    (tmp_path / "rows.json").write_text(json.dumps([rows.tables["reference"][i] for i in order]))
    tokens = sum(rows.lengths["reference"][i] for i in order)
    found: dict[str, list[tuple[dict, list]]] = {"plain": [], "hfsd": []}
    for at in range(2):  # in turn, so that a slow phase meets both
        for name, code, source, asked in (
            ("plain", PLAIN, tmp_path / "rows.json", settings),
            ("hfsd", OURS, tmp_path, {"sft": settings}),
        ):
            out = tmp_path / f"{name}{at}"
            cost = peak(code, str(base), str(source), str(out), json.dumps(asked))
            found[name].append((cost, json.loads((out / "log.json").read_text())))
    best = {name: min(log[1] for _, log in runs) for name, runs in found.items()}
    whole = {name: min(cost["seconds"] for cost, _ in runs) for name, runs in found.items()}
    memory = {name: min(cost["whole"] for cost, _ in runs) for name, runs in found.items()}
    shown = [("what", "training s", "tokens/s", "load to merged s", "peak MB")]
    shown += [(n, f"{best[n]:.1f}", f"{tokens / best[n]:.1f}", f"{whole[n]:.1f}", f"{memory[n]:.0f}") for n in found]
    off = max(abs(a - b) for a, b in zip(found["plain"][0][1][0], found["hfsd"][0][1][0], strict=True))
    shown.append(("largest difference of the losses", f"{off:.1e}", "", "", ""))
    table(f"training {ROWS} rows ({tokens} tokens), SmolLM2-135M less 4 blocks, LoRA r 16, float32", shown)
    assert off < 1e-4
    assert best["hfsd"] <= 1.03 * best["plain"]  # equal, but for what a machine's timing varies
    assert memory["hfsd"] <= 1.03 * memory["plain"]


def test_adapters_behind_the_cut(base: Path, tmp_path: Path, table: Table) -> None:
    from hfsd.engines import Transformers

    files, held_out = _parquet(tmp_path, 96)
    tokenizer = models.load_tokenizer(base)
    answers = [(chat.asked(e), e.reference) for e in held_out[:48]]

    def loss(folder: Path) -> float:
        nats = Transformers(models.load(folder), tokenizer, 2048).nats(answers)
        return sum(n for n in nats if n is not None) / len(answers)

    pruned = train.Pruned(base, surgery.plan_by_hand(30, Prune(remove=REMOVE)), {})
    shown = [("scope", "trained parameters", "training s", "held-out loss (nats per token)")]
    shown.append(("none (pruned)", "0", "-", f"{loss(base):.3f}"))
    seconds = {}
    for scope in ("all", "after-cut"):
        asked = Train(
            lora={"scope": scope},
            sft={"per_device_train_batch_size": BATCH, "learning_rate": RATE},
        )
        out = tmp_path / scope / "sft-d"
        made = train.run(pruned, files, Variant("sft", "d"), asked, out, lambda: pytest.fail("no teacher"))
        seconds[scope] = made.train_seconds
        shown.append((scope, f"{made.trained_params:,}", f"{made.train_seconds:.1f}", f"{loss(out / 'merged'):.3f}"))
    shown.append(("all over after-cut", "", f"{seconds['all'] / seconds['after-cut']:.2f} x", ""))
    table("96 rows, one epoch, SmolLM2-135M less 4 blocks, LoRA r 16, float32", shown)
    assert seconds["all"] >= 1.15 * seconds["after-cut"]
