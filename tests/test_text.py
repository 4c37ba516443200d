"""What is said of scores, differences, draft use and cost, from made-up records."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from hfsd import terminal, text, units
from hfsd.findings import Estimate, Setup
from hfsd.records import Variant
from tests.made import COSTS, DISTILLED, GOOD, PRUNED, SETUP, SFT, VARIANTS, along, documents, draft, made, row, rows


@pytest.mark.parametrize(
    ("found", "kw", "says"),
    [
        (Estimate(94.25, 88.1, 101.24), {}, "94.2 [88.1, 101.2]"),
        (Estimate(0.943, 0.881, 1.012), {"scale": 100, "unit": "%"}, "94.3% [88.1, 101.2]"),
        (Estimate(0.02, -0.04, 0.08), {"scale": 100, "sign": "+", "unit": " points"}, "+2.0 points [-4.0, +8.0]"),
        (Estimate(-0.0001, -0.0002, 0.0), {}, "0.0 [0.0, 0.0]"),
        (Estimate(0.0, -0.1, 0.1), {"sign": "+"}, "0.0 [-0.1, +0.1]"),
        (Estimate(50.0), {}, "50.0 [no interval]"),
        (None, {}, "n/a"),
    ],
)
def test_estimates_print_with_their_interval(found, kw, says):
    assert units.estimate_text(found, **kw) == says


@pytest.mark.parametrize(("p", "says"), [(1.0, "p = 1.00"), (0.0573, "p = 0.057"), (0.00099, "p < 0.001")])
def test_p_values(p, says):
    assert units.p_text(p) == says


def test_the_difference_of_the_arms_has_a_sentence_of_its_own():
    (first,) = text.verdicts(made())
    second = text.verdicts(made(), DISTILLED.id)[1]
    pattern = (
        rf"{re.escape(DISTILLED.id)} - {re.escape(SFT.id)}: in the mean over 2 tasks \+7\.5 points \[[+-]\d+\.\d, "
        r"\+\d+\.\d\] \(exchange test p = 0\.\d+, n = 200\), (better|not told apart at this n); McNemar by task: "
        r"tiny_match p = 0\.\d+, tiny_rank p = 0\.\d+\."
    )
    assert re.fullmatch(pattern, first) and second.startswith(f"{DISTILLED.id} - pruned: ")
    alone = text.verdicts(made(rows=rows({"tiny_match": GOOD["tiny_match"]})))[0]
    assert "in the mean over 1 task +10.0 points" in alone and "(McNemar p = 0.0" in alone and "by task" not in alone
    assert text.verdicts(made(), SFT.id) == [first] and first in text.headline(made())


def test_better_and_worse_are_said_where_the_documents_allow_it():
    few, many = made(rows=rows(GOOD, 20)), made(rows=rows(GOOD, 4000))
    assert {p.verdict for p in few.paired if p.task is None and p.second == SFT.id} == {"not told apart"}
    assert "points [" in text.verdicts(few)[0] and "not told apart at this n" in text.verdicts(few)[0]
    assert "), better" in text.verdicts(many)[0]
    lost = text.losses(many, DISTILLED.id)
    assert "65.0 [63.5, 66.5] against 70.0 [68.6, 71.4]; -5.0 points" in lost[0] and "), worse." in lost[0]
    lost = text.losses(made(), "pruned")
    assert "+0.600 bits_per_byte [" in lost[2] and "(exchange test p < 0.001, n = 200), worse." in lost[2]


def test_both_filters_of_a_task_are_shown_and_one_counts():
    both = rows({"gsm8k": GOOD["tiny_match"]}, metric="exact_match", filter="strict-match", chance=0.0, shots=5)
    both += rows({"gsm8k": (0.72, 0.45, 0.60, 0.68)}, metric="exact_match", filter="flexible-extract", chance=0.0)
    both = [replace(r, shots=5) for r in both]
    results = made(rows=both)
    assert text.table(results)[0][1:3] == ["gsm8k strict-match %", "gsm8k flexible-extract %"]
    assert [t.in_mean for t in results.tasks] == [True, False]
    assert "gsm8k flexible-extract: exact_match, n = 200, 5 shots, chance 0.0%; not in the mean: another metric or" in (
        " ".join(text.notes(results))
    )
    on = [r[1] for r in text.paired_table(results) if r[0] == f"{DISTILLED.id} - {SFT.id}"]
    assert on == ["gsm8k strict-match", "gsm8k flexible-extract", "mean"]


@pytest.mark.parametrize(
    ("setup", "shots", "says"),
    [
        (SETUP, 0, "engine transformers, all documents, in the chat template, seed 0."),
        (
            Setup(limit=24, seed=3, chat_template=True, multiturn=True),
            5,
            "engine transformers, limit 24 documents, in the chat template, each shot a turn of the chat, "
            "shots drawn by the task's own sampler, seed 3.",
        ),
        (
            Setup(limit=1, fewshot="fixed", engine="vllm"),
            5,
            "engine vllm, limit 1 document, without a chat template, shots in one text with the question, "
            "shots fixed: the first ones for every question, seed 0.",
        ),
    ],
)
def test_the_setup_is_said_once(setup, shots, says):
    notes = text.notes(made(rows=rows(GOOD, setup=setup, shots=shots)))
    assert [n for n in notes if says in n] == [f"All tasks: {says}"]
    assert notes[0].startswith(f"tiny_match: acc, n = 200, {shots} shots, chance 25.0%; counts")


def test_what_differs_between_tasks_is_said_with_the_task():
    mixed = rows({"tiny_match": GOOD["tiny_match"]}, shots=5)
    mixed += rows({"tiny_rank": GOOD["tiny_rank"]}, setup=replace(SETUP, limit=200))
    first, second, common, *_ = text.notes(made(rows=mixed))
    assert "5 shots, chance 25.0%, all documents; counts" in first
    assert "0 shots, chance 25.0%, limit 200 documents; counts" in second
    assert common == (
        "All tasks: engine transformers, in the chat template, each shot a turn of the chat, "
        "shots drawn by the task's own sampler, seed 0."
    )


def test_local_data_is_said_with_its_task():
    local = rows({"tiny_match": GOOD["tiny_match"]}, setup=replace(SETUP, data="a.jsonl rows [0, 9)", comparable=False))
    notes = text.notes(made(rows=local + rows({"tiny_rank": GOOD["tiny_rank"]})))
    assert "local data: a.jsonl rows [0, 9); counts in the mean; not comparable with the leaderboard." in notes[0]
    assert "leaderboard" not in notes[1] and notes[2].startswith("All tasks: ")


def test_kl_is_along_the_sampled_answers_and_the_references_are_noted():
    results = made()
    assert [r[-3] for r in text.table(results)[1:]][1:3] == ["1.500 [1.264, 1.736]", "0.900 [0.664, 1.136]"]
    (sampled,) = [n for n in text.notes(results) if n.startswith("KL is")]
    (references,) = [n for n in text.notes(results) if n.startswith("KL along the references")]
    assert "8 held-out prompts (300 tokens)" in sampled and "pruned 3.000 [2.764, 3.236]" in references
    assert not [n for n in text.notes(made(shifts=[])) if n.startswith("KL")]


def test_of_a_single_prompt_there_is_no_interval():
    alone = replace(along(1.5), prompts=1, kl_stderr=None, overlap_stderr=None)
    assert text.kl_text(alone) == "1.500 [no interval]"
    assert text.kl_text(replace(alone, prompts=2, kl_stderr=0.1)) == "1.500 [0.229, 2.771]"  # t of one degree: 12.7
    single = replace(draft(PRUNED, 0.6), prompts=1, n_tokens=9, acceptance_stderr=None)
    results = made(drafts=[single])
    assert text.draft_table(results)[1][1] == "60.0 [no interval]"
    assert "(Student's t), n = 1 prompt (9 tokens)." in text.draft_notes(results)[0]


def test_mean_of_ratios_is_noted_where_it_differs():
    assert [n for n in text.notes(made()) if n.startswith("Mean of the tasks' own recoveries instead")]
    alone = made(rows=rows({"tiny_match": GOOD["tiny_match"]}))
    assert not [n for n in text.notes(alone) if n.startswith("Mean of the tasks'")]


def test_several_seeds_are_compared_seed_by_seed():
    first, second = replace(DISTILLED, seed=1), replace(DISTILLED, seed=2)
    sft = replace(SFT, seed=2)
    scores = rows(GOOD)
    more = [replace(r, variant=v) for v in (first, second) for r in scores if r.variant == DISTILLED]
    more += [replace(r, variant=sft) for r in scores if r.variant == SFT]
    kept = [r for r in scores if r.variant not in (SFT, DISTILLED)] + more
    results = made(rows=kept, params=dict.fromkeys([*(v.id for v in VARIANTS), first.id, second.id, sft.id], 7))
    heads = [line.split(":")[0] for line in text.verdicts(results)]
    assert heads == [f"{first.id} - pruned", f"{second.id} - {sft.id}"]
    assert text.seeds_table(results)[1][:3] == ["self-distilled-tiny-data", "1, 2", "60.0 ± 0.0"]


def test_the_draft_table():
    told = draft(PRUNED, 0.6)
    refused = replace(draft(SFT, 0.0), refused="its tokenizer is another one", tokens_per_pass={}, speedup=None)
    unmeasured = replace(draft(DISTILLED, 0.8), speedup=None, measured="")
    results = made(drafts=[refused, unmeasured, told])
    table = text.draft_table(results)
    gammas = [f"g={g}" for g in range(1, 9)]
    assert table[0] == ["variant", "acceptance %", "greedy %", *gammas, "speed-up x [least, greatest prompt]"]
    assert (
        table[1][:5] == ["pruned", "60.0 [55.3, 64.7]", "70.0", "1.60", "1.96"] and table[1][-1] == "1.10 [1.00, 1.30]"
    )
    assert [row[3:-1] for row in text.draft_table(results, (1, 8))[:2]] == [["g=1", "g=8"], ["1.60", "2.47"]]
    assert table[2] == [SFT.id, *["n/a"] * 11] and table[3][-1] == "n/a"
    notes = text.draft_notes(results)
    assert notes[-1] == f"{SFT.id} is no draft for the original: its tokenizer is another one."
    assert notes[1] == "Speed-up: 4 drafted tokens, 3 prompts of 32 tokens."
    assert "over prompts (Student's t), n = 8 prompts (300 tokens). Greedy" in notes[0]
    assert text.draft_table(made(drafts=[])) == [] == text.draft_notes(made(drafts=[]))


def test_the_cost_table():
    table = text.cost_table(made())
    assert table[0] == ["what", "original", "pruned", "pruned / original"]
    cells = {r[0]: r[1:] for r in table[1:]}
    assert cells["parameters"] == ["1.0 M", "700,000", "0.700 x"]
    assert cells["decode, tokens/s [least, greatest turn]"] == ["40.0 [39.0, 42.0]", "60.0 [55.0, 61.0]", "1.500 x"]
    bare = [replace(c, kv_bytes=None, prefill=None, decode=None, peak_bytes=None, measured="") for c in COSTS]
    cells = {r[0]: r[1:] for r in text.cost_table(made(costs=bare))[1:]}
    assert cells["KV cache per token"] == ["n/a"] * 3 == cells["prefill, tokens/s [least, greatest turn]"]
    assert {len(r) for r in text.cost_table(made(costs=COSTS[:1]))} == {2}
    assert text.cost_table(made(costs=[])) == [] == text.cost_notes(made(costs=[]))
    assert "fixed part" not in str(table) and len(text.cost_notes(made())) == 2


def test_the_cost_table_says_of_which_type_bytes_are_and_what_is_not_known():
    told = [
        replace(COSTS[0], dtype="bfloat16", state_bytes=4096, kv_bytes=None, note="no cache: a reason"),
        replace(COSTS[1], dtype="bfloat16", state_bytes=2048, kv_bytes=None, note="no cache: a reason"),
    ]
    cells = {r[0]: r[1:] for r in text.cost_table(made(costs=told))[1:]}
    assert cells["KV cache per token (bfloat16)"] == ["n/a"] * 3
    assert cells["fixed part of the cache (bfloat16)"] == ["4.1 kB", "2.05 kB", "0.500 x"]
    assert "peak memory of a process with this model alone (bfloat16)" in cells and "checkpoint" in cells
    notes = text.cost_notes(made(costs=told))
    assert "does not grow with the text" in notes[1] and notes[2:] == ["Cache: no cache: a reason.", "Measured: x."]


def test_the_terminal_prints_every_table_within_80_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    terminal.print_results(made(), tmp_path)
    shown = capsys.readouterr().out
    tables = [line for line in shown.splitlines() if line.startswith(("│", "┃", "┏", "└"))]
    assert max(map(len, tables)) <= 80 and {"Differences from sft", "Cost"} <= {
        line.strip() for line in shown.splitlines()
    }
    assert "As drafts for the original" in shown and "recovery %" in shown
    flat = " ".join(shown.split())
    for note in (*text.draft_notes(made()), *text.cost_notes(made())):
        assert f"- {note}" in flat
    assert "g=4" in shown and "g=5" not in shown


def test_differences_are_from_the_original_from_sft_or_from_any_arm():
    results = made()
    pairs = {
        against: [r[0] for r in text.paired_table(results, against)[1:]] for against in ("original", "sft", "arms")
    }
    assert set(pairs["sft"]) == {f"{DISTILLED.id} - {SFT.id}"} < set(pairs["arms"]) and len(pairs["sft"]) == 4
    assert {p.split(" - ")[1] for p in pairs["original"]} == {"original"} and len(pairs["original"]) == 12
    assert {p.split(" - ")[1] for p in pairs["arms"]} == {"pruned", SFT.id}
    assert text.paired_table(results)[0][-1] == "verdict at this n"


def test_the_closing_numbers_are_plain_json():
    from hfsd.plain import to_json

    found = to_json(terminal.numbers(made()))
    assert found["variants"]["pruned"]["recovery"]["value"] == pytest.approx(100 * 0.35 / 0.65)
    assert found["paired"][0]["first"] == "pruned" and found["paired"][0]["verdict"] == "worse"


def test_a_variant_that_no_task_measures_alike_is_compared_where_it_can_be():
    scores = rows(GOOD) + [row(v, "f1", 0.5, metric="f1", chance=None) for v in VARIANTS]
    known = {k: t for k, t in documents(scores).items() if k[1] != "f1"}
    results = made(rows=scores, documents=known)
    assert {p.task for p in results.paired} == {"tiny_match", "tiny_rank", None}
    assert "f1: no paired interval, since the score is no mean over documents." in text.notes(results)
    assert Variant("pruned").id in text.paired_table(results)[1][0]
