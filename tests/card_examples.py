"""The example cards of `cards/examples/`, and the records of a real run that they are rendered from.

python -m tests.card_examples          # renders the cards anew, after a change of templates or sentences
python -m tests.card_examples RUN      # takes the records of a finished demo run first
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hfsd import cards
from hfsd.findings import Results
from hfsd.plain import dumps, from_json, load, to_json
from hfsd.records import Example, Rewrite
from hfsd.rundir import read_json, write_atomic

EXAMPLES = Path(__file__).parents[1] / "cards" / "examples"
RECORDS = EXAMPLES / "demo.records.json"
NAMESPACE = "your-name"


def records(root: Path, command: str = "hfsd run demo") -> dict[str, Any]:
    """What the cards of a finished run are functions of, as plain data; texts are of generated word problems only."""
    import yaml

    from hfsd import fetch, recipes, rewrite, staging

    results = load(Results, root / "report" / "results.json")
    recipe = recipes.validate(yaml.safe_load((root / "recipe.yaml").read_text(encoding="utf-8")))
    source = fetch.Source(root, results.original, on_hub="source" not in results.facts)
    examples = [pair for d in recipe.data for pair in cards.shown(rewrite.read(root / recipe.rewrite_step(d.label)))]
    about = {"command": command, "commit": results.facts.get("git"), "machine": results.facts.get("machine")}
    return to_json(
        {
            "about": about,
            "results": results,
            "repos": staging.plan(recipe, root, source, NAMESPACE).ids,
            "examples": examples,
            "drawn": ["shift.png"],
        }
    )


def rendered(found: dict[str, Any]) -> dict[str, str]:
    """Every card of a run, by its file name."""
    results, repos = from_json(Results, found["results"]), found["repos"]
    examples = [(from_json(Example, e), from_json(Rewrite, r)) for e, r in found["examples"]]
    ids = [v.variant.id for v in results.variants if v.variant.id in repos]
    made = {f"demo.{i}.md": cards.model_card(results, i, repos, {}) for i in ids}
    made["demo.dataset.md"] = cards.dataset_card(results, repos, examples, found["drawn"])
    return made | {"demo.space.md": cards.space_card(results, repos)}


if __name__ == "__main__":
    for run in sys.argv[1:2]:
        write_atomic(RECORDS, dumps(records(Path(run))))
    for name, card in rendered(read_json(RECORDS)).items():
        write_atomic(EXAMPLES / name, card)
