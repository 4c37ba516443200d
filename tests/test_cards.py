"""Cards from made-up records: front matter, safety of names and texts, determinism, and the card's own checks."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import replace

import pytest
import yaml

from hfsd import assets, cards, metadata, plain, recipes, staging
from hfsd.errors import BadRequest, HfsdError
from hfsd.findings import Results, Setup
from hfsd.records import Example, MergeReport, ModelRef, Rewrite, Variant
from tests.made import DISTILLED, GOOD, SFT, draft, html, made, rows

GGUF = ModelRef("package:tiny==0.1/tiny/tiny.Q4_1.gguf", "sha256:" + "b" * 64)
REPOS = {
    "original": "me/tiny-original",
    "pruned": "me/tiny-pruned2",
    SFT.id: "me/tiny-pruned2-sft-tiny-data",
    DISTILLED.id: "me/tiny-pruned2-self-distilled-tiny-data",
    "dataset": "me/tiny-data-self-distilled",
    "space": "me/tiny-space",
}
MODELS = ("original", "pruned", SFT.id, DISTILLED.id)
EXAMPLES = [
    (Example("q1", "2 + 3?", "It is 5."), Rewrite("q1", "Five.", True, "kept", 3, "stop")),
    (Example("q2", "4 + 4?", "It is 8."), Rewrite("q2", "Nine.", False, "wrong answer", 3, "stop")),
]


def front(card: str) -> dict:
    """The YAML front matter."""
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)[1])


def body(card: str) -> str:
    """What follows the front matter."""
    return card.split("\n---\n", 1)[1]


def all_cards(results: Results, repos: dict[str, str] = REPOS, facts: dict | None = None) -> dict[str, str]:
    """Every card of a run."""
    found = {i: cards.model_card(results, i, repos, facts or {}) for i in MODELS}
    found["dataset"] = cards.dataset_card(results, repos, EXAMPLES)
    return found | {"space": cards.space_card(results, repos)}


def test_every_card_passes_its_own_checks():
    for name, card in all_cards(made(original=GGUF)).items():
        assert cards.validate(card) == [], name


def test_cards_are_equal_to_the_byte_even_from_a_file():
    read_back = plain.from_json(Results, json.loads(plain.dumps(made())))
    assert all_cards(made()) == all_cards(made()) == all_cards(read_back)


@pytest.mark.parametrize("variant_id", MODELS)
def test_model_index_round_trip(variant_id):
    from huggingface_hub import ModelCard

    results = made()
    card = ModelCard(cards.model_card(results, variant_id, REPOS, {}))
    assert card.data.model_name == REPOS[variant_id].split("/")[1]
    found = {e.dataset_name: e.metric_value for e in card.data.eval_results}
    assert found == {t.task: pytest.approx(t.scores[variant_id].value) for t in results.tasks}
    assert all(type(v) is float for v in found.values())
    again = ModelCard(str(card))
    assert again.data.to_dict() == card.data.to_dict()


def test_front_matter_of_the_family():
    found = {k: front(v) for k, v in all_cards(made(original=GGUF)).items()}
    assert "base_model" not in found["original"] and "base_model_relation" not in found["original"]
    assert found["pruned"]["base_model"] == "me/tiny-original"
    assert found[SFT.id]["base_model"] == found[DISTILLED.id]["base_model"] == "me/tiny-pruned2"
    assert {found[i]["base_model_relation"] for i in MODELS[1:]} == {"finetune"}
    assert found["original"]["tags"] == ["hfsd"]
    assert found["pruned"]["tags"] == found[SFT.id]["tags"] == ["hfsd", "layer-pruning"]
    assert found[DISTILLED.id]["tags"] == ["hfsd", "layer-pruning", "self-data-distillation"]
    assert "datasets" not in found["pruned"] and found[DISTILLED.id]["datasets"] == ["me/tiny-data-self-distilled"]
    for i in MODELS:
        assert found[i]["license"] == "apache-2.0" and found[i]["language"] == ["en"]
        assert found[i]["pipeline_tag"] == "text-generation" and found[i]["library_name"] == "transformers"
    assert found["dataset"]["size_categories"] == "n<1K" and "license" not in found["dataset"]
    assert found["dataset"]["configs"][0]["default"] is True
    assert found["space"]["python_version"] == "3.12" and found["space"]["sdk"] == "gradio"
    assert len(found["space"]["short_description"]) <= 60
    assert found["space"]["models"] == [REPOS[i] for i in MODELS]


def test_a_hub_original_is_the_base_model_without_being_published():
    repos = {k: v for k, v in REPOS.items() if k != "original"}
    assert front(cards.model_card(made(), "pruned", repos, {}))["base_model"] == "org/tiny"
    no_pruned = {k: v for k, v in repos.items() if k != "pruned"}
    assert front(cards.model_card(made(), SFT.id, no_pruned, {}))["base_model"] == "org/tiny"


def test_a_local_original_that_is_not_published_gives_no_base_model():
    local = made(original=ModelRef("/home/joe/tiny", "sha256:" + "c" * 64))
    card = cards.model_card(local, "pruned", {"pruned": "me/tiny-pruned2"}, {})
    assert "base_model" not in front(card) and "/home/joe" not in card and cards.validate(card) == []


def test_original_from_a_gguf_states_quantisation_and_source():
    card = cards.model_card(
        made(original=GGUF), "original", REPOS, {"quantization": "Q4_1", "source": "wheel tiny 0.1"}
    )
    assert "That file is quantised: Q4_1." in card and "wheel tiny 0.1" in card and "unpruned original" in card
    assert "What was removed" not in card and "assistant_model" not in card


def test_differences_drafts_and_costs_are_in_the_card():
    card = cards.model_card(made(), DISTILLED.id, REPOS, {})
    page = html(body(card))
    assert f">{DISTILLED.id} - {SFT.id}</td>" in page and "McNemar's p is exact" in page
    assert page.count(">80.0 [75.3, 84.7]<") == 1 and "60.0 [55.3, 64.7]" not in page  # its own draft use only
    assert "prefill, tokens/s" in page and "0.700 x" in page
    refused = replace(draft(DISTILLED, 0.8), refused="its tokenizer is another one", acceptance=0.0)
    card = cards.model_card(made(drafts=[draft(SFT, 0.7), refused]), DISTILLED.id, REPOS, {})
    assert "assistant_model" not in card and cards.validate(card) == []
    without = cards.model_card(made(drafts=[], costs=[], documents={}), DISTILLED.id, REPOS, {})
    assert cards.validate(without) == [] and "McNemar" not in without and "depends on how often" in without


def test_a_score_of_local_data_is_marked_in_the_front_matter():
    setup = Setup(data="arc.jsonl rows [0, 90); shots from rows [90, 100)", comparable=False)
    card = cards.model_card(made(rows=rows(GOOD, setup=setup)), "pruned", REPOS, {})
    (first, *_) = front(card)["model-index"][0]["results"]
    assert "not comparable with the leaderboard" in first["metrics"][0]["name"]
    assert "arc.jsonl rows" in card and card.count("not comparable with the leaderboard") == 4


def test_unknown_license_is_said_and_not_invented():
    card = cards.model_card(made(facts={}), DISTILLED.id, REPOS, {})
    assert "license" not in front(card) and "license of the original model is not known" in card
    assert "language" not in front(card)


def test_the_card_says_what_it_recovers_and_what_it_lost():
    card = cards.model_card(
        made(), DISTILLED.id, REPOS, {"limits": ["It knows no other language."], "machine": "2 cores"}
    )
    plain_text = card.replace("\\", "")
    assert re.search(r"it recovers 92\.3% \[\d\d\.\d, \d+\.\d\] of the original's mean score", plain_text)
    assert re.search(r"87\.5% \[\d\d\.\d, \d+\.\d\] chance-corrected", plain_text)
    assert re.search(
        r"- tiny_match \(%\): 65\.0 .* against 70\.0 .* -5\.0 points .* not told apart at this n\.", plain_text
    )
    assert "It knows no other language." in card
    assert "removes blocks \\[2, 4) of 6" in card
    assert (
        "75.0% of 20 rows" in card
        and "trained parameters | 4,096" in card
        and "lora_targets | q_proj, v_proj" in card
        and "warmup" not in card
    )
    assert "What the original's card says of itself" in card
    assert "2410.09982" in card and "name: tiny" in card and "hfsd run recipe.yaml" in card and "2 cores" in card


def test_no_task_counts_and_the_card_says_so():
    flat = made(rows=rows({"tiny_match": (0.25, 0.25, 0.25, 0.25)}))
    card = cards.model_card(flat, DISTILLED.id, REPOS, {})
    assert "no task qualifies" in card and cards.validate(card) == []
    assert front(card)["model-index"][0]["results"]


def test_pictures_named_in_the_card_are_those_to_publish():
    assert cards.pictures(made()) == ["recovery.png", "block_scores.png"]
    for results in (made(), made(scan=None)):
        card = cards.model_card(results, "pruned", REPOS, {})
        assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", card) == cards.pictures(results)


def test_the_recipe_loses_its_local_folders_and_says_so():
    card = cards.model_card(made(recipe="model: /home/joe/tiny.gguf\n"), "pruned", REPOS, {})
    assert "/home/joe" not in card and "model: tiny.gguf" in card and "left out" in card


def test_examples_with_a_local_path_are_not_shown():
    leak = (Example("q3", "Where?", "There."), Rewrite("q3", "In /home/joe/secret.txt", True, "kept", 3, "stop"))
    card = cards.dataset_card(made(), REPOS, [leak, *EXAMPLES])
    assert "joe" not in card and "q1" in card and "not used: the final answers differ" in card


def test_cards_are_clean_markdown():
    facts = {"data_commits": {"org/rows": "c" * 40}}
    full = cards.dataset_card(made(facts=facts), REPOS, EXAMPLES, ["shift.png"])
    for name, card in (all_cards(made()) | {"full dataset": full}).items():
        outside = re.sub(r"^(`{3,})[^\n]*\n.*?^\1$", "```", body(card), flags=re.DOTALL | re.MULTILINE)
        assert not re.search(r"[ \t]+$", card, re.MULTILINE), name
        assert "\n\n\n" not in outside and card.endswith("\n") and not card.endswith("\n\n"), name
        assert re.findall(r"^# ", outside, re.MULTILINE) == ["# "], name
        lines = outside.split("\n")
        for i, line in enumerate(lines):
            if line.startswith("#"):
                assert lines[i - 1] == "" and lines[i + 1] == "", (name, line)
            if line.startswith("```"):
                assert lines[i - 1] == "" and (i + 1 == len(lines) or lines[i + 1] == ""), (name, i)


@pytest.mark.parametrize(
    ("variant_id", "repos", "says"),
    [
        ("sft", REPOS, "no variant 'sft'"),
        (SFT.id, {}, "no repo id for"),
        ("pruned", {"pruned": "/home/joe/pruned"}, "the Hub takes"),
        ("pruned", {"pruned": 'x"); import os'}, "the Hub takes"),
    ],
)
def test_bad_requests(variant_id, repos, says):
    with pytest.raises(BadRequest, match=re.escape(says)):
        cards.model_card(made(), variant_id, repos, {})


def test_a_run_without_rewrites_has_no_dataset_card():
    with pytest.raises(BadRequest, match="no rewritten data set"):
        cards.dataset_card(made(train_sets={}), REPOS, [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("license: apache-2.0", "license: apache 2"), "license:"),
        (("license: apache-2.0", "license: other"), "needs a license_name"),
        (("base_model: me/tiny-pruned2", "base_model: runs/tiny/pruned"), "base_model:"),
        (("base_model_relation: finetune", "base_model_relation: pruned"), "base_model_relation:"),
        (("value: 0.65", "value: .nan"), "no finite number"),
        (("value: 0.65", "value: .inf"), "no finite number"),
        (("pipeline_tag: text-generation", "pipeline_tag: None"), "pipeline_tag: has no value"),
        (("pipeline_tag: text-generation", "pipeline_tag:"), "pipeline_tag: has no value"),
        (("## Cost", "## Cost\n\nSaved in /home/joe/runs/x."), "local path: /home/joe/runs/x"),
        (("## Cost", "## Cost\n\n| a | None |"), "shows None as a value"),
        (("## Cost", "## Cost\n\nIt took: nan"), "shows nan as a value"),
        (("---\nlanguage", "language"), "no YAML front matter"),
        (("license: apache-2.0", "license: ["), "no YAML"),
    ],
)
def test_validate_finds(change, says):
    card = cards.model_card(made(), DISTILLED.id, REPOS, {})
    assert change[0] in card
    found = cards.validate(card.replace(*change, 1))
    assert len(found) == 1 and says in found[0], found


def test_validate_lets_words_be():
    card = cards.model_card(
        made(), "pruned", REPOS, {"limits": ["None of the tasks is long; and/or 3/4 of http://a.b/c/d."]}
    )
    assert cards.validate(card) == []


def test_seeds_and_merges_have_cards_too():
    seeded, merged = Variant("self-distilled", "tiny-data", 1), Variant("merged")
    scores = rows(GOOD)
    more = [replace(r, variant=v) for v in (seeded, merged) for r in scores if r.variant == DISTILLED]
    params = dict.fromkeys([*MODELS, seeded.id, merged.id], 700_000)
    how = MergeReport("slerp", 0.5, (SFT.id, DISTILLED.id), None, {}, [], 0.0, 0.0, 1.0, 1, "0.1.5")
    results = made(rows=scores + more, params=params, merges={merged.id: how})
    for v in (seeded, merged):
        card = cards.model_card(results, v.id, REPOS | {v.id: f"me/{v.id}"}, {})
        assert cards.validate(card) == [] and "self-data-distillation" in front(card)["tags"]
        of = [REPOS[SFT.id], REPOS[DISTILLED.id]] if v == merged else REPOS["pruned"]
        assert front(card)["base_model"] == of
        assert front(card)["base_model_relation"] == ("merge" if v == merged else "finetune")
    alone = cards.model_card(results, merged.id, {"pruned": "me/tiny-pruned2", merged.id: "me/merged"}, {})
    assert front(alone)["base_model"] == "me/tiny-pruned2" and front(alone)["base_model_relation"] == "finetune"


def test_assets_are_found_in_a_wheel_and_in_a_checkout(tmp_path, monkeypatch):
    assert (assets.assets("cards") / "model.md.j2").is_file()
    monkeypatch.setattr(assets, "PACKAGE", tmp_path / "site" / "hfsd")
    with pytest.raises(HfsdError, match="install hfsd again"):
        assets.assets("cards")
    (tmp_path / "site" / "cards").mkdir(parents=True)
    assert assets.assets("cards") == tmp_path / "site" / "cards"
    (tmp_path / "site" / "hfsd" / "_assets" / "cards").mkdir(parents=True)
    assert assets.assets("cards") == tmp_path / "site" / "hfsd" / "_assets" / "cards"
    with pytest.raises(HfsdError, match="no assets named"):
        assets.assets("../etc")


def test_licenses_are_known_identifiers():
    assert {"apache-2.0", "mit", "llama3.1", "gemma", "other"} <= metadata.LICENSES


def test_the_dataset_card_says_what_each_configuration_is_and_what_was_asked():
    (train_set,) = made().train_sets.values()
    asked = ({"role": "user", "content": "Rewrite {reference} ``` for {prompt}"},)
    told = dataclasses.replace(train_set, asked=asked, mode="best", reference_nats=1.5, rewrite_nats=1.25)
    card = cards.dataset_card(made(train_sets={"tiny-data": told}), REPOS, EXAMPLES)
    assert [c["config_name"] for c in front(card)["configs"]] == ["self-distilled", "reference"]
    for name in ("self-distilled", "reference"):
        assert f"configuration {name}: the " in card
    assert "user:\nRewrite {reference} ``` for {prompt}" in card and "Mode best" in card
    assert "the original's loss on all of them is 1.25 nats per token, on the references 1.50" in card
    assert "All rewrites, those not used included, are 10% shorter than the references" in card
    assert "the final answers differ, so the reference is used" in card and "much longer" not in card


def test_dropped_rows_are_in_no_text_and_in_no_count():
    (train_set,) = made().train_sets.values()
    dropped = dataclasses.replace(train_set, rows=1200, used=800, on_reject="drop")
    results = made(train_sets={"tiny-data": dropped})
    card = cards.dataset_card(results, REPOS, EXAMPLES)
    assert "the others left both sets" in card and "What the original was asked" not in card
    assert front(card)["size_categories"] == "n<1K" and "reference answer where" not in card
    assert "configuration self-distilled: the original's own answers; rows whose rewrite was not acceptable" in card
    assert "the final answers differ, so the row is left out" in card and "is used |" not in card
    assert "tiny-data: 800 rows with the reference answers as they are." in cards.model_card(results, SFT.id, REPOS, {})
    kept = made(train_sets={"tiny-data": dataclasses.replace(dropped, used=None, on_reject="reference")})
    assert front(cards.dataset_card(kept, REPOS, EXAMPLES))["size_categories"] == "1K<n<10K"
    assert "tiny-data: 1200 rows with" in cards.model_card(kept, SFT.id, REPOS, {})


def test_the_dataset_card_says_which_model_at_which_commit_and_how_it_was_sampled():
    (train_set,) = made().train_sets.values()
    sampling = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 64}
    told = dataclasses.replace(train_set, sampling=sampling, tokens_per_second=88.9)
    on_hub = {k: v for k, v in REPOS.items() if k != "original"}
    facts = {"data_commits": {"org/rows": "c" * 40}, "data_source": "org/rows"}
    card = cards.dataset_card(made(train_sets={"tiny-data": told}, facts=facts), on_hub, EXAMPLES)
    assert f"rewritten by [org/tiny](https://huggingface.co/org/tiny) at commit {'a' * 40} in its own words" in card
    assert f"- [org/rows](https://huggingface.co/datasets/org/rows) at commit {'c' * 40}" in card
    assert "engine transformers (max_new_tokens 64, temperature 0.7, top_p 0.9)" in " ".join(
        card.replace("\\", "").split()
    )
    assert "800 tokens in 9.0 s (88.9 per second)." in card and cards.validate(card) == []
    read_from = (
        f"[me/tiny-original](https://huggingface.co/me/tiny-original) (read from {GGUF.repo} at {GGUF.revision})"
    )
    published = cards.dataset_card(made(original=GGUF), REPOS, EXAMPLES)
    assert f"rewritten by {read_from} in its own words" in published.replace("\\_", "_")
    assert "The source data:" not in published


def test_the_dataset_card_shows_the_picture_that_lies_beside_it():
    card = cards.dataset_card(made(), REPOS, EXAMPLES, ["shift.png"])
    assert re.findall(r"!\[[^]]*\]\(([^)]*)\)", card) == ["shift.png"] and cards.validate(card) == []
    assert "![" not in cards.dataset_card(made(), REPOS, EXAMPLES)


def test_the_picture_of_the_shift_is_published_where_there_is_one(tmp_path):
    rewriting = tmp_path / "rewrite"
    rewriting.mkdir()
    for name in (*cards.DATA_FILES.values(), "rewrites.jsonl"):
        (rewriting / name).write_text("")
    asked = {"name": "tiny", "model": "org/tiny", "data": "rows.jsonl", "prune": {"remove": "0:1"}}
    family = staging.Family(recipes.validate(asked), tmp_path, None, made(), [], REPOS)
    assert "shift.png" not in staging._stage_dataset(family, tmp_path / "older")
    (rewriting / "shift.png").write_bytes(b"\x89PNG")
    assert "](shift.png)" in staging._stage_dataset(family, tmp_path / "newer")
    staged = {"reference.parquet", "self-distilled.parquet", "rewrites.jsonl"}
    assert {p.name for p in (tmp_path / "older").iterdir()} == staged
    assert {p.name for p in (tmp_path / "newer").iterdir()} == staged | {"shift.png"}
