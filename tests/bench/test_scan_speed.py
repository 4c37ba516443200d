"""The scan against the bare forward passes it rides on, and against one pass per width."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from hfsd import calibration, data, models, recipes, scan
from tests.bench.conftest import Table, in_turn

pytestmark = pytest.mark.bench
SEQUENCES, LENGTH, BUDGET, WIDTHS = 16, 512, 2048, range(1, 11)


def _one_pass_per_width(model, batches) -> dict[int, list[float]]:
    """What public tools do: for each width all hidden states of a pass, and the distances of that width."""
    import torch

    found = {}
    for width in WIDTHS:
        sums, count = [], 0
        for batch in batches:
            with torch.inference_mode():
                states = model(input_ids=batch.ids, attention_mask=batch.seen, output_hidden_states=True).hidden_states
            kept = [s[batch.text].double() for s in states[:-1]]  # the last one is behind the final norm
            cos = [
                torch.nn.functional.cosine_similarity(a, b, dim=-1) for a, b in zip(kept, kept[width:], strict=False)
            ]
            sums.append(torch.stack([(c.clamp(-1, 1).arccos() / math.pi).sum() for c in cos]))
            count += int(batch.text.sum())
        found[width] = (torch.stack(sums).sum(0) / count).tolist()
    return found


def test_scan_speed(demo_folder: Path, table: Table) -> None:
    import torch

    model, tokenizer = models.load(demo_folder), models.load_tokenizer(demo_folder)
    passages = data.passages(recipes.load("demo")[0].data[0].model_copy(update={"pool": 400}))
    text = "\n".join(message["content"] for talk in passages for message in talk)
    chosen = calibration.sequences(tokenizer, [text], SEQUENCES, LENGTH)
    batches = list(calibration.batches(tokenizer, chosen, BUDGET, model.device))
    assert sum(int(b.seen.sum()) for b in batches) == SEQUENCES * LENGTH

    def bare() -> None:
        with torch.inference_mode():
            for batch in batches:
                model.base_model(input_ids=batch.ids, attention_mask=batch.seen, use_cache=False)

    found = {}

    def scanned() -> None:
        found["ours"] = scan.score(model, batches, SEQUENCES, "angular")["all"]

    bare()
    seconds = in_turn(3, forward=bare, scan=scanned)
    seconds |= in_turn(1, per_width=lambda: found.update(theirs=_one_pass_per_width(model, batches)))
    tokens = SEQUENCES * LENGTH
    rows = [("what", "seconds", "tokens/s", "of forward")]
    rows += [(k, f"{s:.1f}", f"{tokens / s:.0f}", f"{s / seconds['forward']:.3f}") for k, s in seconds.items()]
    rows.append(("per_width / scan", f"{seconds['per_width'] / seconds['scan']:.1f} x", "", ""))
    table(f"scan: {SEQUENCES} x {LENGTH} tokens, SmolLM2-135M, float32, widths 1..10", rows)
    for width, values in found["theirs"].items():
        assert found["ours"].values[width][: len(values)] == pytest.approx(values, abs=1e-6)
    assert seconds["scan"] <= 1.15 * seconds["forward"]
    assert seconds["per_width"] >= 8 * seconds["scan"]
