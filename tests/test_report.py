"""What the written report says and shows, and that no text in it becomes markup. All records are made up."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfsd import figures, markdown, page, plain, records, report, report_figures, report_text, score_figures, text
from hfsd.findings import Results
from hfsd.records import BlockScores, PrunePlan, Variant
from tests.made import (
    BREAKOUT,
    DISTILLED,
    GOOD,
    ORIGINAL,
    PLAN,
    PRUNED,
    SFT,
    VARIANTS,
    answers,
    html,
    made,
    row,
    rows,
    scan,
)


def test_the_words_follow_the_intervals():
    small, large = made(rows=rows(GOOD, 20)), made(rows=rows(GOOD, 2000))
    assert f"{DISTILLED.id} - {SFT.id}: in the mean over 2 tasks +7.5 points" in text.headline(small)
    assert "not told apart at this n" in text.headline(small)
    assert "+7.5 points" in text.headline(large) and ", better" in text.headline(large)
    assert "points" in report.markdown(large, [], []).split("### From the original")[1]


def test_table_has_one_row_per_variant_with_intervals():
    table = report.table(made())
    assert [r[0] for r in table] == ["variant", "original", "pruned", SFT.id, DISTILLED.id]
    assert {len(r) for r in table} == {10}
    assert table[1][1] == "70.0 [63.3, 75.9]" and table[4][3] == "0.950 [0.930, 0.970]"
    assert table[4][7:] == ["0.400 [0.164, 0.636]", "700,000", "12"]
    notes = " ".join(text.notes(made()))
    assert "n = 200" in notes and "chance 25.0%" in notes and "not in the mean: lower is better" in notes


def test_variants_stand_in_one_order_whatever_the_input():
    mixed = list(reversed(rows(GOOD)))
    assert [v.variant for v in made(rows=mixed).variants] == list(VARIANTS)
    assert [t.variant for t in made().training] == [SFT, DISTILLED]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A report written once: the pictures are what costs time here."""
    return report.write(made(), answers(), tmp_path_factory.mktemp("report"))


PICTURES = [
    *("recovery.png", "tasks.png", "block_scores.png", "candidates.png", "loss.png"),
    *("kl_sampled.png", "kl_references.png", "similarity.png"),
]


def test_written_files(written: list[Path]):
    import matplotlib.image

    tmp_path = written[0].parent
    names = [p.name for p in written]
    assert names == ["results.json", *PICTURES, "report.md", "index.html"] == sorted_as(names, tmp_path)
    assert plain.load(Results, tmp_path / "results.json") == made()
    for picture in tmp_path.glob("*.png"):
        pixels = matplotlib.image.imread(picture)
        assert min(pixels.shape[:2]) > 200 and pixels[..., :3].std() > 0.01
        assert (pixels[0, :, :3] == 1).all(), "white behind, to its edge"
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert all(f"({n})" in page for n in PICTURES)
    assert "9 of 9 held-out prompts" in page and "name: tiny" in page and "hfsd run recipe.yaml --out runs/tiny" in page
    assert page.index("Removing 2 of 6 blocks") < page.index("recovery.png") < page.index("| variant |")


def sorted_as(names: list[str], folder: Path) -> list[str]:
    """The files of the folder in the order of the names: the same where every file was told."""
    return sorted((p.name for p in folder.iterdir()), key=names.index)


def test_the_markdown_has_every_section_in_the_order_of_the_page():
    page = report.markdown(made(), answers(n=25), PICTURES)
    titles = [line[3:] for line in page.splitlines() if line.startswith("## ")]
    assert titles == [
        *("Scores", "Differences", "What was removed", "Data", "Training", "Shift from the original"),
        *("Side by side", "Draft use", "Cost", "Provenance"),
    ]
    assert "20 of 25 held-out prompts" in page and "### q19" in page and "### q20" not in page
    for said in ("mean of ratios", "g=8", "McNemar", "KV cache per token", "similarity (ROUGE-1)", "lora_targets"):
        assert said in page, said


def test_what_was_not_measured_has_no_section():
    scores = rows({"tiny_match": (0.30, 0.30, 0.25, 0.25)})  # near chance: nothing counts
    bare = made(rows=scores, scan=None, shifts=[], training=[], train_sets={}, drafts=[], costs=[], stage_seconds={})
    page = report.markdown(bare, [], [])
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["## Scores", "## Differences", "## What was removed", "## Provenance"]
    assert "| all: ratio of means | n/a | n/a | n/a |" in page and not re.search(r"\b(None|nan|inf)\b", page)


def test_same_records_same_bytes(written: list[Path], tmp_path: Path):
    for path, again in zip(written, report.write(made(), answers(), tmp_path), strict=True):
        assert path.name == again.name and path.read_bytes() == again.read_bytes(), path.name


def test_a_reader_of_results_json_gets_the_same_report():
    again = plain.from_json(Results, plain.to_json(made()))
    read_back = plain.from_json(Results, json.loads(plain.dumps(made())))
    assert (
        report.markdown(again, answers(), [])
        == report.markdown(read_back, answers(), [])
        == report.markdown(made(), answers(), [])
    )


def test_steps_of_the_cost_table_stand_in_run_order():
    assert [s for s, _ in text.stages(made())] == ["scan", "rewrite", f"train/{SFT.id}", f"train/{DISTILLED.id}"]


def test_two_different_shares_are_explained_and_equal_ones_are_not():
    apart = report_text.saved(made(param_cut=0.163, matmul_flop_cut=0.1744))
    assert apart == (
        "The cut saves 16.30% of the parameters and 17.44% of the matmul FLOPs per token (two numbers: not every "
        "parameter is multiplied with every token)."
    )
    tied = report_text.saved(made(param_cut=0.10529, matmul_flop_cut=0.10531))
    assert tied == "The cut saves 10.53% of the parameters and 10.53% of the matmul FLOPs per token."


def test_a_histogram_shows_every_value_and_the_exact_mean():
    row = report_figures.Row(PRUNED, [-1e-8, 0.0, 0.5, 1.0], 0.3754321, "0.375 [0.100, 0.700]")
    nothing = report_figures.Row(SFT, [], None, "n/a")
    shown, empty = report_figures.histograms([row, nothing], {"pruned": "pruned", SFT.id: "sft"}, 1.0, "nats").axes
    assert sum(bar.get_height() for bar in shown.patches) == 4 and shown.patches[0].get_height() == 2
    assert shown.lines[0].get_xdata()[0] == 0.3754321 and not empty.lines
    assert shown.get_title(loc="right") == "mean 0.375 [0.100, 0.700]"


def test_a_cut_given_by_hand_has_no_scan(tmp_path: Path):
    results = made(scan=None, plan=PrunePlan(6, (0, 2, 5), ""), shifts=[])
    names = [p.name for p in report.write(results, [], tmp_path)]
    assert names == ["results.json", "recovery.png", "tasks.png", "loss.png", "report.md", "index.html"]
    page = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "given by hand" in page and "block_scores" not in page


def test_few_widths_and_several_cuts_still_draw():
    few = replace(scan(), scores={"all": BlockScores("bi", "all", 8, 400, {1: [0.1, 0.2, 0.1, 0.3, 0.2, 0.5]})})
    gaps = PrunePlan(6, (0, 2, 4, 5), "by hand")
    for found, plan in ((few, PLAN), (scan(), gaps), (few, gaps)):
        figures.block_scores(found.scores["all"], plan).draw_without_rendering()
        figures.candidates(found, plan).draw_without_rendering()


def test_the_chosen_scores_are_those_that_proposed_the_cut():
    last = replace(PLAN, why="lowest angular distance over last tokens")
    assert figures.chosen_scores(replace(scan(), candidates=[]), last).tokens == "last"
    assert figures.chosen_scores(scan(), PLAN).tokens == "all"


def test_every_arm_has_its_colour():
    for colours in (figures.COLOURS, page.DARK):
        assert list(colours) == list(records.ARMS) and len(set(colours.values())) == len(records.ARMS)


def test_commands_are_those_of_the_command_line():
    from typer.main import get_command

    from hfsd.cli import app

    apart = made(name="a b", plan=PrunePlan(9, (0, 2, 3, 4, 8), ""), original=replace(made().original, repo="x y/z"))
    told = {command.split()[1]: command for _, command in report_text.commands(apart)}
    assert list(told) == ["plan", "run", "prune", "report", "space"]
    assert told["prune"] == f"hfsd prune 'x y/z' --keep 0,2:5,8 --out cut --set model.revision={'a' * 40}"
    for command in told.values():
        _, name, *arguments = shlex.split(command)
        parsed = get_command(app).commands[name].make_context(name, arguments)  # raises on what it does not know
        assert "x y/z" in parsed.params.values() or "runs/a b" in map(str, parsed.params.values()) or name == "plan"
    assert "prune" not in [c.split()[1] for _, c in report_text.commands(made(plan=PrunePlan(2, (0, 1), "")))]


def test_names_in_pictures_say_only_what_tells_variants_apart():
    one = [ORIGINAL, PRUNED, SFT, DISTILLED]
    assert list(score_figures.short_names(one).values()) == ["original", "pruned", "sft", "self-distilled"]
    seeds = [ORIGINAL, *(Variant("sft", "d", seed) for seed in (0, 1))]
    assert list(score_figures.short_names(seeds).values()) == ["original", "sft-s0", "sft-s1"]
    sets = [ORIGINAL, Variant("sft", "a", 0), Variant("sft", "b", 0), Variant("merged")]
    assert list(score_figures.short_names(sets).values()) == ["original", "sft-a", "sft-b", "merged"]
    odd = [Variant("sft"), Variant("sft", "a")]
    assert list(score_figures.short_names(odd).values()) == ["sft", "sft-a"]


def test_a_group_of_many_tasks_is_drawn_in_part_and_told_whole():
    names = [f"mmlu_{i:02}" for i in range(20)]
    results = made(rows=rows(dict.fromkeys(names, (0.70, 0.40, 0.55, 0.65)), 20), documents={})
    titles = [axes.get_title(loc="left") or axes.get_title() for axes in score_figures.tasks(results).axes]
    assert len(titles) == 17 and titles[0] == "mean of 20 tasks, n = 20" and titles[16].startswith("mmlu_15, n = 20")
    page = report.markdown(results, [], PICTURES)
    assert "the first 16 of 20 tasks; the table has all" in page and "mmlu_19 %" in page.replace("\\", "")


def test_answers_cannot_leave_their_fence():
    page = html(report.markdown(made(), answers(BREAKOUT, BREAKOUT, n=1), []))
    assert "<script>" not in page and "<img" not in page and "heading</h1>" not in page
    assert page.count("alert(") == 5  # shown as text: the prompt and four answers


def test_names_cannot_become_markup():
    nasty = "<b>x</b> [click](http://example.com) | `a` *b* $x$ # h\n# h2"
    results = made(name=nasty, plan=replace(PLAN, why=nasty), rows=rows({nasty: (0.7, 0.4, 0.5, 0.6)}))
    page = html(report.markdown(results, answers(n=1), []))
    assert (
        "<b>" not in page and "<a " not in page and "<em>" not in page and "<h1>h2" not in page and "<h2>h2" not in page
    )
    scores = page.split("</table>", 1)[0]
    assert scores.count("<tr>") == 5 and scores.count("<td") == 4 * 8  # the planted `|` opened no cell


@given(st.text(max_size=200))
def test_a_fence_holds_any_text(source):
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").parse("x\n\n" + markdown.fence(source) + "\n\nend\n")
    assert [t.type for t in tokens if t.type == "fence"] == ["fence"]
    assert tokens[-2].content == "end"


@given(st.text(max_size=80))
def test_escaped_text_is_one_paragraph_of_text(source):
    from markdown_it import MarkdownIt

    blocks = MarkdownIt("commonmark").enable("table").parse("- " + markdown.escape(source) + " end\n")
    inline = next(t for t in blocks if t.type == "inline")
    assert [t.type for t in blocks if t.level == 2] == ["paragraph_open", "paragraph_close"]
    assert {t.type for t in inline.children} <= {"text", "text_special"}


@pytest.mark.parametrize(
    ("given_", "kept"),
    [
        ("path: /home/joe smith/models/tiny.gguf", "path: tiny.gguf"),
        ("path: ~/models/tiny", "path: tiny"),
        ("path: C:\\Users\\joe\\tiny", "path: tiny"),
        ("path: package:dist==1.0/folder/file.gguf", "path: package:dist==1.0/folder/file.gguf"),
        ("url: http://127.0.0.1:8000/v1", "url: http://127.0.0.1:8000/v1"),
        ("model: org/name, 10 tokens/s, ./data/x.jsonl", "model: org/name, 10 tokens/s, ./data/x.jsonl"),
    ],
)
def test_local_paths_keep_their_last_name_only(given_, kept):
    assert markdown.without_paths(given_) == kept


def test_the_import_is_light():
    code = (
        "import sys, hfsd.report, hfsd.page, hfsd.cards, hfsd.assets\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'gradio', 'datasets', 'huggingface_hub', 'jinja2'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 0, done.stderr


def test_several_seeds_are_reported_as_mean_and_spread() -> None:
    arms = [Variant(arm, "d", seed) for arm in ("sft", "self-distilled") for seed in (0, 1, 2)]
    values = dict(zip([ORIGINAL, PRUNED, *arms], (0.8, 0.4, 0.5, 0.6, 0.7, 0.66, 0.7, 0.74), strict=True))
    scores = [row(v, "tiny_match", x) for v, x in values.items()]
    params = {v.id: 1000 for v in values}
    found = made(rows=scores, params=params, shifts=[], training=[])
    assert text.seeds_table(found) == [
        ["arm", "seeds", "mean %", "recovery %"],
        ["sft-d", "0, 1, 2", "60.0 ± 10.0", "75.0 ± 12.5"],
        ["self-distilled-d", "0, 1, 2", "70.0 ± 4.0", "87.5 ± 5.0"],
    ]
    page = report.markdown(found, [], [])
    assert "## Over seeds" in page and "60.0 ± 10.0" in page
    one = [r for r in scores if r.variant.seed in (None, 0)]
    assert text.seeds_table(made(rows=one, params=params, shifts=[], training=[])) == []
