"""Block scores against a plain computation from hidden states, and the choice of the cut."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfsd import calibration, chat, data, models, scan, surgery
from hfsd.blocks_cut import Data
from hfsd.blocks_cut import Scan as ScanRecipe
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.plain import load
from hfsd.records import BlockScores, ModelRef, Scan
from tests import tiny

PASSAGES = [chat.conversation(row) for row in (tiny.example(i) for i in range(9))]
ASKED = ScanRecipe(rows=6, verify_rows=3, max_length=256, batch_tokens=600, candidates=2, screen_rows=0)


@pytest.fixture(scope="module")
def loaded(model_folder: Path):
    return models.load(model_folder), models.load_tokenizer(model_folder)


def _run(loaded, passages=PASSAGES, blocks=2, **changes) -> Scan:
    asked = ScanRecipe.model_validate(ASKED.model_dump() | changes)
    return scan.run(*loaded, passages, asked, blocks, ModelRef("m"))


def _score(loaded, count: int, metric: str, budget: int = 600) -> dict[str, BlockScores]:
    model, tokenizer = loaded
    chosen = calibration.sequences(tokenizer, PASSAGES, count, 256)
    return scan.score(model, calibration.batches(tokenizer, chosen, budget, model.device), count, metric)


def _streams(model, ids):
    """The stream entering each block and the one before the final norm, by running the blocks one after another."""
    import torch

    taken = []
    hooks = [
        b.register_forward_pre_hook(lambda m, a, k: taken.append(a[0]), with_kwargs=True) for b in model.model.layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, a: taken.append(a[0])))
    with torch.inference_mode():
        model(ids)
    for hook in hooks:
        hook.remove()
    return taken


@pytest.mark.parametrize("choice", ["all", "last"])
def test_scores_equal_a_plain_computation(loaded, choice: str) -> None:
    import torch

    model, tokenizer = loaded
    got = _score(loaded, 6, "angular")[choice]
    sums, count = torch.zeros(7, 7, dtype=torch.float64), 0
    for ids, is_text in calibration.sequences(tokenizer, PASSAGES, 6, 256):  # one at a time, no padding
        streams = _streams(model, torch.tensor([ids]))
        picked = [i for i, t in enumerate(is_text) if t]
        picked = picked if choice == "all" else picked[-1:]
        for a in range(7):
            for b in range(7):
                one, other = streams[a][0, picked].double(), streams[b][0, picked].double()
                cos = torch.nn.functional.cosine_similarity(one, other)
                sums[a, b] += (cos.clamp(-1, 1).arccos() / math.pi).sum()
        count += len(picked)
    assert got.n_tokens == count and got.samples == 6
    assert sorted(got.values) == [1, 2, 3, 4, 5]
    for width in range(1, 6):
        expected = [(sums[s, s + width] / count).item() for s in range(7 - width)]
        assert got.values[width] == pytest.approx(expected, abs=1e-6)


def test_scores_do_not_depend_on_the_batching(loaded) -> None:
    for metric in ("angular", "bi"):
        one, many = _score(loaded, 6, metric, budget=1)["all"], _score(loaded, 6, metric, budget=10_000)["all"]
        for width, values in one.values.items():
            assert values == pytest.approx(many.values[width], abs=1e-6)


def test_block_influence_sums_over_the_range(loaded) -> None:
    import torch

    model, tokenizer = loaded
    got = _score(loaded, 1, "bi")["all"].values
    assert got[3][1] == pytest.approx(got[1][1] + got[1][2] + got[1][3])
    ids, is_text = calibration.sequences(tokenizer, PASSAGES, 1, 256)[0]
    streams = _streams(model, torch.tensor([ids]))
    cos = torch.nn.functional.cosine_similarity(streams[2][0], streams[3][0], dim=-1)[torch.tensor(is_text)]
    assert got[1][2] == pytest.approx(1 - cos.mean().item(), abs=1e-5)


def test_only_what_the_author_wrote_counts(loaded) -> None:
    _, tokenizer = loaded
    messages = [{"role": "user", "content": " Why? "}, {"role": "assistant", "content": "Because user user."}]
    ids, is_text = calibration.sequences(tokenizer, [messages], 1, 256)[0]
    assert tokenizer.decode([t for t, yes in zip(ids, is_text, strict=True) if yes]) == "Why?Because user user."
    assert tokenizer.decode(ids) == chat.transcript(tokenizer, messages)


@pytest.mark.parametrize(
    "said", [("user", "assistant"), ("a", "im_start"), ("<|im_end|>", "user"), ("x\nuser\nx", "x"), (" ", "so")]
)
def test_words_of_the_template_are_not_taken_for_text(loaded, said: tuple[str, str]) -> None:
    _, tokenizer = loaded
    messages = [{"role": r, "content": c} for r, c in zip(("user", "assistant"), said, strict=True)]
    whole = chat.transcript(tokenizer, messages)
    spans = calibration._spans(tokenizer, messages, whole)
    asked, answered = (c.strip() for c in said)
    at = whole.index("user\n") + len("user\n")
    back = whole.rindex("<|im_start|>assistant\n") + len("<|im_start|>assistant\n")
    expected = [(at, at + len(asked))] if asked else []
    assert spans == [*expected, (back, back + len(answered))]


def test_blank_text_is_no_text_and_parts_of_a_message_are_joined(tmp_path: Path) -> None:
    (tmp_path / "blank.txt").write_text(" \n\t\n")
    with pytest.raises(BadRequest, match="has no usable text"):
        data.passages(Data(source=str(tmp_path / "blank.txt")))
    parts = [{"type": "text", "text": "Hello"}, {"type": "image"}, {"type": "text", "text": " there"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": parts}]}))
    assert data.passages(Data(source=str(tmp_path / "chat.jsonl"))) == [[{"role": "user", "content": "Hello there"}]]
    (tmp_path / "notes.md").write_text("# A title")
    assert data.passages(Data(source=str(tmp_path / "notes.md"))) == ["# A title"]


def test_a_raw_text_is_cut_into_windows_without_a_template(loaded) -> None:
    _, tokenizer = loaded
    found = calibration.sequences(tokenizer, ["abcdefghij", "", "xyz"], 9, 4)
    assert [tokenizer.decode([t for t, yes in zip(*s, strict=True) if yes]) for s in found] == [
        "abcd",
        "efgh",
        "ij",
        "xyz",
    ]
    assert len(calibration.sequences(tokenizer, ["abcdefghij"], 2, 4)) == 2


def test_every_shape_of_calibration_data_is_read(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": "Once upon a time"}) + "\n")
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "plain.txt").write_text("One text.\nIn two lines.\n")
    tiny.data_file(tmp_path / "pairs.jsonl", 2)
    assert data.passages(Data(source=str(tmp_path / "raw.jsonl"))) == ["Once upon a time"]
    assert data.passages(Data(source=str(tmp_path / "plain.txt"))) == ["One text.\nIn two lines.\n"]
    assert data.passages(Data(source=str(tmp_path / "chat.jsonl"))) == [turns]
    roles = [[m["role"] for m in p] for p in data.passages(Data(source=str(tmp_path / "pairs.jsonl")))]
    assert roles == [["user", "assistant"]] * 2


def test_verified_takes_the_candidate_with_the_least_loss(loaded) -> None:
    found = _run(loaded)
    best = min(found.candidates, key=lambda c: c.loss)
    assert found.plan.removed == best.removed
    assert found.plan.scores["loss"] == best.loss and found.plan.scores["original_loss"] == found.original_loss
    assert found.plan.scores["angular_all"] == found.scores["all"].values[2][best.removed[0]]
    assert "deepest but the last" in {name for c in found.candidates for name in c.proposed_by.split(", ")}
    lowest = _run(loaded, select="lowest", tokens="last")
    values = lowest.scores["last"].values[2]
    assert lowest.plan.removed[0] == values.index(min(values)) and lowest.candidates == []


def test_screening_finds_what_the_distances_do_not_propose(loaded) -> None:
    found = _run(loaded, blocks=3, candidates=1, screen_rows=9)  # every held-out sequence: it cannot miss
    losses = {r: _loss_of_cut(loaded, r) for r in ((i, i + 1, i + 2) for i in range(4))}
    assert found.plan.removed == min(losses, key=losses.__getitem__)
    assert "screening" in next(c.proposed_by for c in found.candidates if c.removed == found.plan.removed)
    assert "screening" not in {n for c in _run(loaded, blocks=3).candidates for n in c.proposed_by.split(", ")}


def _loss_of_cut(loaded, removed: tuple[int, ...]) -> float:
    """The held-out loss of a really cut model, one sequence at a time."""
    import torch

    model, tokenizer = loaded
    kept = [i for i in range(6) if i not in removed]
    cut, nats, count = surgery.view(model, kept), 0.0, 0
    for ids, is_text in calibration.sequences(tokenizer, PASSAGES, 3, 256):
        with torch.inference_mode():
            logs = cut(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for at in range(1, len(ids)):
            if is_text[at]:
                nats -= logs[at - 1, ids[at]].item()
                count += 1
    return nats / count


def test_candidates_losses_are_those_of_the_cut_models(loaded) -> None:
    found = _run(loaded, candidates=9)
    assert found.original_loss == pytest.approx(_loss_of_cut(loaded, ()), rel=1e-5)
    assert len(found.candidates) == 5
    for candidate in found.candidates:
        assert candidate.loss == pytest.approx(_loss_of_cut(loaded, candidate.removed), rel=1e-5)


def test_greedy_search_removes_any_blocks_one_at_a_time(loaded) -> None:
    found = _run(loaded, blocks=3, search="greedy")
    removed: tuple[int, ...] = ()
    for step in found.candidates:
        options = {i: _loss_of_cut(loaded, tuple(sorted((*removed, i)))) for i in range(6) if i not in removed}
        removed = tuple(sorted((*removed, min(options, key=options.__getitem__))))
        assert step.removed == removed and step.loss == pytest.approx(min(options.values()), rel=1e-5)
    assert found.plan.removed == removed and len(removed) == 3
    assert found.plan.scores["loss"] == found.candidates[-1].loss


def test_the_model_is_left_as_it_was(loaded) -> None:
    model, _ = loaded
    _run(loaded)
    for block in model.model.layers:
        assert "forward" not in block.__dict__ and not block._forward_hooks and not block._forward_pre_hooks


def test_only_sound_ranges_are_proposed(loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = loaded
    monkeypatch.setattr(model.config, "decoder_sparse_step", 3, raising=False)
    assert {c.removed for c in _run(loaded, blocks=3, candidates=9).candidates} == {(i, i + 1, i + 2) for i in range(4)}
    # Only the last two blocks can go without a shift of the pattern.
    assert {c.removed for c in _run(loaded, blocks=2).candidates} == {(4, 5)}
    monkeypatch.setattr(model.config, "num_kv_shared_layers", 2, raising=False)
    with pytest.raises(Refusal, match="llama: its last 2 blocks reuse the keys and values"):
        _run(loaded)


def test_pictures_and_records_are_written(loaded, tmp_path: Path) -> None:
    found = _run(loaded, widths="1:4")
    scan.write(found.scores, "all", tmp_path, found)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert set(scores) == {"metric", "tokens", "samples", "n_tokens", "values"}
    assert [len(scores["values"][w]) for w in ("1", "2", "3")] == [6, 5, 4] and len(scores["values"]) == 3
    assert load(Scan, tmp_path / "scan.json") == found
    for picture in ("scores.png", "losses.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


WORKER = """
import sys
from pathlib import Path
from hfsd import scan
from hfsd.plain import dumps
from tests import test_scan as t
from hfsd import models
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
loaded = models.load(folder), models.load_tokenizer(folder)
import os
found = [t._run(loaded, batch_tokens=300, rows=5), t._run(loaded, batch_tokens=300, search="greedy")]
from hfsd import processes
processes.leave()
text = "".join(dumps(f.scores) + dumps(f.candidates) + dumps(f.plan) for f in found)
(out / f"{os.environ.get('WORLD_SIZE', '1')}-{os.environ.get('RANK', '0')}").write_text(text)
"""


def test_one_and_two_processes_agree_to_the_last_bit(model_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    root = Path(__file__).parents[1]
    env = os.environ | {"PYTHONPATH": str(root)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for launcher in ([sys.executable], torchrun):
        command = [*launcher, str(tmp_path / "worker.py"), str(model_folder), str(tmp_path)]
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    alone, *both = [(tmp_path / name).read_text() for name in ("1-0", "2-0", "2-1")]
    assert both == [alone, alone]


def test_a_model_spread_over_devices_scores_the_same(loaded, model_folder: Path, tmp_path: Path) -> None:
    from accelerate import dispatch_model

    _, tokenizer = loaded
    model = models.load(model_folder)
    places = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places |= {f"model.layers.{i}": "cpu" if i < 3 else "disk" for i in range(6)}
    spread = dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    here, there = _run(loaded), _run((spread, tokenizer))
    assert there.scores == here.scores and there.candidates == here.candidates and there.plan == here.plan


def test_a_loss_that_is_no_number_is_never_chosen(model_folder: Path, loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from hfsd.verify import Verifier

    real = Verifier._nats
    first = min(_run(loaded).candidates, key=lambda c: c.removed)

    def poisoned(self, batch):
        return float("nan") if self._removed and first.removed[-1] + 1 not in self._removed else real(self, batch)

    monkeypatch.setattr(Verifier, "_nats", poisoned)
    found = _run(loaded)
    assert first.removed != found.plan.removed and first.removed not in [c.removed for c in found.candidates]
    monkeypatch.setattr(Verifier, "_nats", lambda self, batch: float("nan") if self._removed else real(self, batch))
    with pytest.raises(HfsdError, match="without the blocks of any candidate the loss is NaN or infinite"):
        _run(loaded)
    monkeypatch.setattr(Verifier, "_nats", real)
    model = models.load(tiny.llama(model_folder.parent / "untied", tied=False))
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(HfsdError, match="the loss is NaN or infinite; try model.dtype"):
        _run((model, loaded[1]))
    with pytest.raises(BadRequest, match="no text token to predict in the held-out sequences"):
        _run(loaded, ["abc def ghi"], max_length=1)


def test_bad_input(model_folder: Path, loaded) -> None:
    import torch

    with pytest.raises(BadRequest, match="prune.blocks is 6; this model has 6 blocks, so 1 to 5 can go"):
        _run(loaded, blocks=6)
    with pytest.raises(BadRequest, match="3 calibration sequences, and scan.verify_rows keeps 3 apart"):
        _run(loaded, PASSAGES[:3])
    with pytest.raises(BadRequest, match="no usable text in 2 calibration passages"):
        _run(loaded, ["", [{"role": "user", "content": " "}]])
    with pytest.raises(BadRequest, match=r"scan.widths is 1:9; this model has ranges of width 1 to 5"):
        _run(loaded, widths="1:9")
    for poison in (float("nan"), float("inf")):
        model = models.load(model_folder)
        with torch.no_grad():
            model.model.layers[2].mlp.down_proj.weight.fill_(poison)
        with pytest.raises(HfsdError, match="a hidden state is NaN, infinite or zero"):
            _run((model, loaded[1]))
    model = models.load(model_folder)
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    with pytest.raises(HfsdError, match="a hidden state is NaN, infinite or zero"):
        _run((model, loaded[1]))
