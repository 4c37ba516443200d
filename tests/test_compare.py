"""What a variant moved, drafts and costs: nought for the original, equal to a plain computation, never made again."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from hfsd import chat, compare, models, prune, speculation, speed, surgery
from hfsd.compare import Checkpoints
from hfsd.engines import Transformers
from hfsd.errors import BadRequest
from hfsd.family import Family
from hfsd.findings import Along, Draft
from hfsd.recipe import Compare
from hfsd.records import Example, ModelRef, PrunePlan, Variant
from hfsd.rundir import Stage
from tests import tiny

PROMPTS = [Example(f"p{i}", p["question"], p["answer"]) for i, p in enumerate(tiny.problems(3))]
ASKED = Compare(prompts=3, max_new_tokens=6)
TWO = [Variant("original"), Variant("pruned")]
CUT, WHOLE = (0, 1, 4, 5), tuple(range(6))


@pytest.fixture(scope="module")
def folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The original, a cut of it, and another model of the cut's shape."""
    root = tmp_path_factory.mktemp("folders")
    prune.run(model_folder, ModelRef("tiny", None), PrunePlan(6, CUT, "by hand"), root / "cut", "structure")
    return {"original": model_folder, "pruned": root / "cut", "sft": tiny.llama(root / "whole", n_layers=4, seed=3)}


def _run(
    folders: Mapping[str, Path],
    out: Path,
    kept: tuple[int, ...] = CUT,
    variants: list[Variant] = TWO,
    recipe: Compare = ASKED,
    prompts: list[Example] = PROMPTS,
) -> compare.Compared:
    whole = {v.id: folders[v.id] for v in variants[2:]}
    family = Family(models.load(folders["original"]), kept, {}, whole)
    checkpoints, tokenizer = Checkpoints(folders), models.load_tokenizer(folders["original"])
    compare.run(family, tokenizer, prompts, variants, recipe, checkpoints, out)
    compare.weigh(checkpoints, out)
    return compare.read(out)


def test_a_cut_of_nothing_has_not_moved(model_folder: Path, tmp_path: Path) -> None:
    found = _run({"original": model_folder, "pruned": model_folder}, tmp_path, WHOLE)
    (shift,), (draft,) = found.shifts, found.drafts
    for along in (shift.sampled, shift.greedy, shift.references):
        assert along.kl == pytest.approx(0, abs=1e-6) and along.top1 == 1.0 and along.prompts == 3
        assert along.overlap == pytest.approx(1, abs=1e-5) and len(along.kls) == 3
    assert shift.similarities == [1.0] * 3 and shift.similarity_by == "ROUGE-1"
    assert draft.acceptance == pytest.approx(1, abs=1e-5) and draft.greedy == 1.0 and not draft.refused
    assert draft.tokens_per_pass == {g: pytest.approx(g + 1, abs=1e-3) for g in range(1, 9)}
    assert draft.speedup and draft.speedup.value > 0 and "2 prompts" in draft.measured and "cpu" in draft.measured


def test_a_generation_config_moves_nothing(model_folder: Path, tmp_path: Path) -> None:
    penal = Path(shutil.copytree(model_folder, tmp_path / "penal"))
    path = penal / "generation_config.json"
    asked = {"repetition_penalty": 2.0, "no_repeat_ngram_size": 2, "min_p": 0.5, "do_sample": True, "top_k": 3}
    path.write_text(json.dumps(json.loads(path.read_text()) | asked))
    found = _run({"original": penal, "pruned": penal}, tmp_path / "out", WHOLE)
    (draft,), (shift,) = found.drafts, found.shifts
    assert draft.greedy == 1.0 and draft.measured.count("texts equal") == 1
    assert shift == _run({"original": model_folder, "pruned": model_folder}, tmp_path / "free", WHOLE).shifts[0]


def test_a_single_prompt_has_no_interval(folders: dict[str, Path], tmp_path: Path) -> None:
    found = _run(folders, tmp_path, prompts=PROMPTS[:1])
    (draft,), (shift,) = found.drafts, found.shifts
    assert shift.sampled.kl_stderr is None and draft.acceptance_stderr is None
    assert (draft.prompts, draft.n_tokens) == (1, shift.sampled.n_tokens)


def test_the_shift_equals_a_plain_computation(folders: dict[str, Path], tmp_path: Path) -> None:
    found = _run(folders, tmp_path)
    (shift,), (draft,) = found.shifts, found.drafts
    original, pruned = (models.load(folders[i]).double() for i in ("original", "pruned"))
    tokenizer = models.load_tokenizer(folders["original"])
    texts = {k: _texts(tmp_path / "work" / f"{k}.json") for k in ("sampled", "greedy")}
    texts["references"] = [
        (head, tail[:6]) for head, tail in (chat.answer_ids(tokenizer, chat.asked(e), e.reference) for e in PROMPTS)
    ]
    for kind, pairs in texts.items():
        _equal(getattr(shift, kind), *_plain(original, pruned, pairs))
    (overlap, first) = (_plain(original, pruned, texts[k])[i] for k, i in (("sampled", 1), ("greedy", 2)))
    assert draft.acceptance == pytest.approx(overlap, abs=1e-4) and draft.greedy == pytest.approx(first)
    assert draft.acceptance_stderr == shift.sampled.overlap_stderr > 0
    assert (draft.prompts, draft.n_tokens) == (3, shift.sampled.n_tokens)
    assert draft.tokens_per_pass[3] == pytest.approx(speculation.tokens_per_pass(draft.acceptance, 3))
    assert [a.id for a in found.answers] == ["p0", "p1", "p2"]
    engine = Transformers(models.load(folders["original"]), tokenizer)
    for answer, (_, tail) in zip(found.answers, texts["greedy"], strict=True):
        assert set(answer.answers) == {"original", "pruned"} and answer.answers["original"] == engine.text(tail)


def _texts(path: Path) -> list[tuple[list[int], list[int]]]:
    return [(t["head"], t["tail"]) for t in json.loads(path.read_text())]


def _plain(original, pruned, pairs) -> tuple[float, float, float, int]:
    """KL, overlap and the share of tokens that the pruned model puts first, over all tokens; and their number."""
    import torch

    sums, count = [0.0, 0.0, 0.0], 0
    for head, tail in pairs:
        with torch.inference_mode():
            p, q = (
                m(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].softmax(-1) for m in (original, pruned)
            )
        new = [(p * (p / q).log()).sum(), 1 - (p - q).abs().sum() / 2, (q.argmax(-1) == torch.tensor(tail)).sum()]
        new[1] += len(tail) - 1  # 1 for every token
        sums, count = [a + b.item() for a, b in zip(sums, new, strict=True)], count + len(tail)
    return sums[0] / count, sums[1] / count, sums[2] / count, count


def _equal(found: Along, kl: float, overlap: float, _: float, count: int) -> None:
    assert found.n_tokens == count and found.prompts == 3
    assert found.kl == pytest.approx(kl, rel=1e-3) and found.kl > 0 and found.kl_stderr > 0
    assert found.overlap == pytest.approx(overlap, abs=1e-4) and found.overlap < 1


def test_the_temperature_is_that_of_both(folders: dict[str, Path], tmp_path: Path) -> None:
    hot = Compare(prompts=3, max_new_tokens=6, temperature=5.0)
    found = _run(folders, tmp_path, recipe=hot)
    (draft,), (shift,) = found.drafts, found.shifts
    assert draft.acceptance > shift.sampled.overlap  # flatter distributions are more alike
    assert draft.measured.endswith("; acceptance at temperature 5")


def test_whole_checkpoints_and_seeds(folders: dict[str, Path], tmp_path: Path) -> None:
    three = [*TWO, Variant("sft")]
    found = _run(folders, tmp_path / "one", variants=three)
    assert [s.variant.id for s in found.shifts] == [d.variant.id for d in found.drafts] == ["pruned", "sft"]
    assert found.shifts[1].sampled.kl != found.shifts[0].sampled.kl and found.drafts[1].speedup is not None
    again = _run(folders, tmp_path / "two", variants=three)
    assert again.shifts == found.shifts and again.answers == found.answers
    other = _run(folders, tmp_path / "three", recipe=Compare(prompts=3, max_new_tokens=6, seed=1))
    assert other.shifts[0].greedy == found.shifts[0].greedy and other.shifts[0].sampled != found.shifts[0].sampled
    contents = [Stage("compare", tmp_path / name, {}).finish(0.0, {})["content"] for name in ("one", "two", "three")]
    assert contents[0] == contents[1] != contents[2]  # speeds and memory are no part of it


def test_costs_are_counted_and_measured(folders: dict[str, Path], tmp_path: Path) -> None:
    original, pruned = _run(folders, tmp_path).costs
    assert (original.shape, pruned.shape) == ("original", "pruned")
    for cost, name in ((original, "original"), (pruned, "pruned")):
        assert cost.params == models.count_params(models.load(folders[name]))
        assert cost.prefill and cost.decode and cost.prefill.value > cost.decode.value > 0
        assert cost.peak_bytes == 1 << 20 and "128 tokens read and 16 made, batch 1, 3 turns" in cost.measured
    assert pruned.kv_bytes == original.kv_bytes * 4 // 6 and pruned.matmul_flops < original.matmul_flops  # type: ignore[operator]
    assert pruned.checkpoint_bytes < original.checkpoint_bytes


def test_nothing_that_is_finished_is_made_again(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _run(folders, tmp_path, variants=[*TWO, Variant("sft")])
    for place in ((Transformers, "tokens"), (compare.divergence, "logits"), (speculation, "measure"), (speed, "turn")):
        monkeypatch.setattr(*place, lambda *_: pytest.fail("made again"))
    monkeypatch.setattr(speed, "peak_alone", lambda *_: pytest.fail("made again"))
    for name in ("answers.jsonl", "shift.json", "drafts.json", "cost.json"):
        (tmp_path / name).unlink()
    assert _run(folders, tmp_path, variants=[*TWO, Variant("sft")]) == first


def test_a_killed_measurement_goes_on_with_what_is_missing(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(folders, tmp_path / "whole", variants=[*TWO, Variant("sft")])
    real, calls = compare.divergence.logits, []

    def dies(*given):
        calls.append(1)
        if len(calls) == 9:  # two texts per prompt and one variant: in the middle of the second kind
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(compare.divergence, "logits", dies)
    with pytest.raises(KeyboardInterrupt):
        _run(folders, tmp_path / "killed", variants=[*TWO, Variant("sft")])
    again = _run(folders, tmp_path / "killed", variants=[*TWO, Variant("sft")])
    assert len(calls) - 9 == 6 * 2 * 3 - 6  # every text of original and variant, less those along the first kind
    assert again.shifts == whole.shifts and again.answers == whole.answers
    assert [d.acceptance for d in again.drafts] == [d.acceptance for d in whole.drafts]


def test_a_variant_of_other_tokens_is_no_draft(folders: dict[str, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(folders["sft"], tmp_path / "other"))
    path = other / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(content))
    found = _run({**folders, "sft": other}, tmp_path / "out", variants=[*TWO, Variant("sft")])
    assert [s.variant.id for s in found.shifts] == ["pruned"]
    here = models.load_tokenizer(folders["original"]).get_vocab()
    why = f"its tokenizer is another one: token 'A' is {here['B']} there and {here['A']} in the original's"
    assert found.drafts[1] == Draft(Variant("sft"), 0.0, 0.0, 0.0, {}, refused=why)
    assert set(found.answers[0].answers) == {"original", "pruned", "sft"}  # it is still asked, in its own tokens


def test_a_draft_that_does_not_fit_in_memory_is_told(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

    monkeypatch.setattr(Checkpoints, "load", full)
    found = _run(folders, tmp_path)
    assert found.drafts[0].speedup is None and found.drafts[0].acceptance > 0
    assert found.drafts[0].measured == "no speed-up measured: memory is too short for original and draft together"
    assert found.costs[0].prefill is None and found.costs[0].measured.startswith("no speed measured: memory")


def test_prompts_that_leave_no_room(folders: dict[str, Path], tmp_path: Path) -> None:
    long = Example("long", "word " * 400, "yes")  # of 1024 positions
    found = _run(folders, tmp_path / "one", prompts=[long, *PROMPTS[:2]])
    (shift,) = found.shifts
    assert [a.prompts for a in (shift.sampled, shift.greedy, shift.references)] == [2] * 3
    assert len(shift.similarities) == 2 and found.answers[0].answers == {"original": "", "pruned": ""}
    with pytest.raises(BadRequest, match="compare: nothing to measure along .sampled.: each of 1 prompts fills all"):
        _run(folders, tmp_path / "two", prompts=[long])


def test_similarity_by_a_model(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lengths:
        """Embeds a text by whether it is empty."""

        def __init__(self, name: str) -> None:
            assert name == "org/model"

        def encode(self, texts: list[str], **_: object) -> np.ndarray:
            return np.array([[1.0, 0.0] if text else [0.6, 0.8] for text in texts])

    monkeypatch.setitem(sys.modules, "sentence_transformers", SimpleNamespace(SentenceTransformer=Lengths))
    (shift,) = _run(folders, tmp_path, recipe=Compare(prompts=3, max_new_tokens=6, similarity_model="org/model")).shifts
    assert shift.similarities == [1.0] * 3 and shift.similarity_by == "org/model"
    with pytest.raises(BadRequest, match=r"^compare\.similarity_model: no folder ./nowhere, and it is no Hub id"):
        _run(folders, tmp_path / "two", recipe=Compare(prompts=3, similarity_model="./nowhere"))
    assert not (tmp_path / "two").exists()  # told before anything is made


def test_no_prompts(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="no held-out prompt"):
        _run(folders, tmp_path, prompts=[])


def test_an_adapter_moves_by_its_own_weights(model_folder: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model

    base = surgery.view(models.load(model_folder), CUT)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    family = Family(models.load(model_folder), CUT, {"sft": tmp_path / "adapter"})
    three, tokenizer = [*TWO, Variant("sft")], models.load_tokenizer(model_folder)
    compare.run(family, tokenizer, PROMPTS, three, ASKED, Checkpoints(folders), tmp_path / "out")
    compare.weigh(Checkpoints(folders), tmp_path / "out")
    pruned, sft = compare.read(tmp_path / "out").shifts
    head, tail = _texts(tmp_path / "out" / "work" / "sampled.json")[0]
    with torch.inference_mode():
        ids, at = torch.tensor([head + tail]), slice(len(head) - 1, -1)
        p, q = (m(ids).logits[0, at].log_softmax(-1) for m in (family.original, tuned.eval()))
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item() / len(tail)
    assert sft.sampled.kls[0] == pytest.approx(expected, rel=1e-3)
    assert sft.sampled.kls[0] != pytest.approx(pruned.sampled.kls[0], rel=1e-3)
