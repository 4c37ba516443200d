"""What the Hub's own client and a Markdown linter say of every card: the examples', and those of made-up records."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from hfsd import cards, short_cards
from hfsd.findings import Results, Setup
from hfsd.records import Cut, Provenance
from tests.card_examples import EXAMPLES
from tests.hub import hub_env, run_client
from tests.hub.server import LoopbackHub
from tests.made import DISTILLED, SFT, made, rows
from tests.test_cards import GGUF, REPOS, all_cards

FULL = Setup(chat_template=True)
CLIENT = """
import json, sys
from pathlib import Path
from huggingface_hub import DatasetCard, HfApi, ModelCard, SpaceCard
root = Path({root!r})
api, found = HfApi(), {{}}
for name, text in json.loads((root / "cards.json").read_text()).items():
    kind = {{"dataset": DatasetCard, "space": SpaceCard}}.get(name.split("/")[1], ModelCard)
    card = kind(text)
    card.validate()  # POST /api/validate-yaml
    repo = "alice/" + name.replace("/", "-").replace("+", "-")
    api.create_repo(repo, repo_type=card.repo_type, space_sdk="gradio" if card.repo_type == "space" else None)
    card.push_to_hub(repo)
    again = kind.load(repo)
    assert again.data.to_dict() == card.data.to_dict() and again.text == card.text, name
    results = getattr(again.data, "eval_results", None) or []
    found[name] = [[r.dataset_name, r.metric_type, r.metric_value, r.dataset_args] for r in results]
print(json.dumps(found))
"""


def every_card() -> dict[str, str]:
    """By a name whose second part is the kind."""
    found = {f"example/{p.name.split('.')[1]}": p.read_text(encoding="utf-8") for p in EXAMPLES.glob("*.md")}
    results, cut = made(original=GGUF), Provenance(GGUF, 6, (0, 1, 4, 5), [Cut((2, 3), "by hand", {})])
    found["short/adapter"] = short_cards.adapter("me/tiny-adapter", REPOS["pruned"], REPOS[SFT.id], results)
    found["short/checkpoint"] = short_cards.checkpoint("me/tiny-cut", cut, {"license": "mit"}, own_code=True)
    return found | {f"made/{name}": card for name, card in all_cards(results).items()}


def test_the_hub_takes_every_card_and_gives_its_scores_back(tmp_path: Path) -> None:
    (tmp_path / "cards.json").write_text(json.dumps(every_card()))
    with LoopbackHub(tmp_path / "hub", {"hf_alice": "alice"}) as hub:
        out = run_client(CLIENT.format(root=str(tmp_path)), hub_env(hub, "hf_alice", tmp_path / "home"))
        asked = [call for call in hub.calls if call.path.endswith("/api/validate-yaml")]
    found, results = json.loads(out.splitlines()[-1]), made(original=GGUF)
    assert len(asked) >= len(found) == len(every_card())
    assert found[f"made/{DISTILLED.id}"] == [
        [t.task, kind, pytest.approx(t.scores[DISTILLED.id].value), {"num_few_shot": t.shots}]
        for t, kind in zip(results.tasks, ("accuracy", "accuracy", "bits_per_byte"), strict=True)
    ]
    assert found["made/dataset"] == found["made/space"] == [] and len(found["example/pruned"]) == 3


def lint(folder: Path) -> list[str]:
    """What a Markdown linter says of the files of a folder."""
    from pymarkdown.api import PyMarkdownApi

    linter = PyMarkdownApi().enable_extension_by_identifier("front-matter")
    linter.disable_rule_by_identifier("MD013")  # line length: a paragraph is a line
    linter.set_string_property("plugins.md025.front_matter_title", "no-such-key")  # a Space's is its tile's, no heading
    found = linter.scan_path(str(folder))
    return [f"{Path(f.scan_file).name}:{f.line_number} {f.rule_id} {f.rule_description}" for f in found.scan_failures]


def test_a_linter_finds_nothing_in_any_card(tmp_path: Path) -> None:
    for name, card in every_card().items():
        (tmp_path / f"{name.replace('/', '-')}.md").write_text(card, encoding="utf-8")
    assert lint(tmp_path) == []
    (tmp_path / "spoilt.md").write_text("---\ntitle: x\n---\n\n# A\n## B\n* c\n\n\n    d\n", encoding="utf-8")
    assert {said.split()[1] for said in lint(tmp_path)} >= {"MD022", "MD032"}


def gsm8k(n: int = 1319, setup: Setup = FULL, **kw) -> Results:
    """A run that was measured on GSM8K, by both of its filters."""
    asked = {"n": n, "metric": "exact_match", "shots": 5, "chance": 0.0, "setup": setup, "version": "3.0"} | kw
    strict, loose = (tuple(round(n * (s + more)) / n for s in (0.5, 0.1, 0.3, 0.4)) for more in (0, 0.1))
    scores = rows({"gsm8k": strict}, filter="strict-match", **asked)
    return made(rows=scores + rows({"gsm8k": loose}, filter="flexible-extract", **asked))


def test_a_whole_gsm8k_is_a_benchmark_result_of_the_hub() -> None:
    from huggingface_hub import parse_eval_result_entries

    text = cards.eval_results(gsm8k(), DISTILLED.id)
    assert text is not None
    (entry,) = parse_eval_result_entries(yaml.safe_load(text))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "gsm8k", 40.0303)
    assert re.fullmatch(
        r"lm-eval gsm8k, filter strict-match, 5 shots, n = 1319; 95% interval 37\.\d\d to 42\.\d\d; chat template; "
        r"filter flexible-extract: 50\.04",
        entry.notes,
    )
    assert cards.eval_results(gsm8k(), SFT.id) != text == cards.eval_results(gsm8k(), DISTILLED.id)


@pytest.mark.parametrize(
    "results",
    [
        gsm8k(n=100),
        gsm8k(setup=replace(FULL, limit=1319)),
        gsm8k(setup=replace(FULL, comparable=False, data="gsm8k.jsonl")),
        gsm8k(metric="acc"),
        made(),
    ],
    ids=["some documents", "limit", "local data", "another metric", "another task"],
)
def test_anything_else_is_not(results: Results) -> None:
    assert cards.eval_results(results, DISTILLED.id) is None
