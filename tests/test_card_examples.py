"""The example cards are what the committed records of a real run give, and a run of today gives such records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hfsd import cards
from hfsd.rundir import read_json
from tests.card_examples import EXAMPLES, RECORDS, records, rendered

DEMO = Path(__file__).parents[1] / "runs" / "demo"
# Mappings and lists that each run fills in its own way.
COUNTED = {"facts", "reasons", "modes", "losses", "stage_seconds", "kls", "candidates"}


def schema(node: Any, key: str = "") -> Any:
    """Keys and kinds of plain data, without its values."""
    if isinstance(node, dict):
        return {"*"} if key in COUNTED else {k: schema(v, k) for k, v in node.items()}
    if isinstance(node, list):
        return [] if key in COUNTED or not node else [schema(node[0])]
    return "number" if isinstance(node, int | float) and not isinstance(node, bool) else type(node).__name__


def test_the_example_cards_are_what_the_records_give():
    made = rendered(read_json(RECORDS))
    assert {p.name for p in EXAMPLES.glob("*.md")} == made.keys()
    for name, card in made.items():
        assert (EXAMPLES / name).read_bytes() == card.encode(), f"{name}: run `python -m tests.card_examples`"


def test_the_records_say_where_they_are_from_and_name_no_machine():
    found = read_json(RECORDS)
    assert all(found["about"][key] for key in ("commit", "command", "machine"))
    assert cards.LOCAL_PATH.search(RECORDS.read_text(encoding="utf-8")) is None
    assert {e["group"] != "" for e, _ in found["examples"]} == {True}  # generated from templates, licensed by nobody
    assert {r["kept"] for _, r in found["examples"]} == {True, False}


def test_the_example_cards_are_fit_to_be_published():
    for path in EXAMPLES.glob("*.md"):
        assert cards.validate(path.read_text(encoding="utf-8")) == [], path.name


@pytest.mark.slow
@pytest.mark.skipif(not (DEMO / "publish" / "DONE.json").is_file(), reason="needs a finished `hfsd run demo`")
def test_a_finished_demo_run_gives_such_records_and_its_cards_render():
    mine, known = records(DEMO), read_json(RECORDS)
    assert schema(mine) == schema(known)
    assert mine["results"]["facts"].keys() >= known["results"]["facts"].keys()
    for name, card in rendered(mine).items():
        assert cards.validate(card) == [], name
