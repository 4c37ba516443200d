"""Short cards of repos that no evaluation stands behind: an adapter by itself, a checkpoint cut by hand. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hfsd.findings import Results
from hfsd.markdown import escape, fence, without_paths
from hfsd.metadata import COMMIT, HUB, REPO_ID
from hfsd.records import ModelRef, Provenance, spelled

PEFT = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{repo}")
"""
TRANSFORMERS = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{repo}")
tokenizer = AutoTokenizer.from_pretrained("{repo}")
"""


def adapter(repo: str, base: str, merged: str, results: Results) -> str:
    """README.md of an adapter's own repo; all that was measured stands on the card of the merged model."""
    front = _front({**_license(results.facts)}, base, "adapter", "peft")
    return "\n".join(
        [
            front,
            f"# {escape(repo.split('/')[-1])}",
            "",
            f"The adapter of {_link(merged)}, trained on {_link(base)}, which {escape(results.plan.sentence)}. "
            f"Its scores, its data and how it was trained stand on the card of {_link(merged)}.",
            "",
            fence(PEFT.format(base=base, repo=repo).strip(), "python"),
            "",
            _license_sentence(results.facts),
            "",
        ]
    )


def checkpoint(repo: str, made: Provenance, facts: Mapping[str, Any], own_code: bool) -> str:
    """README.md of a checkpoint that was cut by hand.

    Args:
        facts: `license`, `license_name`, `license_link` of the original, where they are known.
        own_code: the model brings Python code of its own.
    """
    base = base_of(made.original)
    gone = tuple(i for i in range(made.n_layers) if i not in set(made.kept))
    name = _link(base) if base else escape(without_paths(made.original.repo))
    lines = [
        _front(_license(facts), base, "finetune", "transformers"),
        f"# {escape(repo.split('/')[-1])}",
        "",
        f"This is {name} without blocks {escape(spelled(gone))} of {made.n_layers}, counted from 0, and with nothing "
        f"trained after the cut; {len(made.kept)} blocks are kept. It was not evaluated here: expect it to be worse "
        "than the original until it is fine-tuned.",
        "",
        *(f"- {escape(without_paths(cut.why))}" for cut in made.cuts),
        "",
        fence(TRANSFORMERS.format(repo=repo).strip(), "python"),
        "",
    ]
    if own_code:
        lines += ["The model brings Python code of its own: it loads with `trust_remote_code=True` only.", ""]
    return "\n".join([*lines, _license_sentence(facts), ""])


def base_of(ref: ModelRef) -> str | None:
    """The Hub id of an original, where it was read from a commit of the Hub."""
    on_hub = ref.revision is not None and COMMIT.fullmatch(ref.revision) and REPO_ID.fullmatch(ref.repo)
    return ref.repo if on_hub else None


def _front(license_: Mapping[str, Any], base: str | None, relation: str, library: str) -> str:
    from huggingface_hub import ModelCardData

    card = ModelCardData(
        **license_,
        library_name=library,
        pipeline_tag="text-generation",
        base_model=base,
        base_model_relation=relation if base else None,
        tags=["hfsd", "layer-pruning"],
    )
    order = ["license", "license_name", "license_link", "library_name"]
    return f"---\n{card.to_yaml(original_order=order)}\n---\n"


def _license(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in ("license", "license_name", "license_link") if facts.get(key)}


def _license_sentence(facts: Mapping[str, Any]) -> str:
    if facts.get("license"):
        return f"License: inherited from the original model, {escape(str(facts['license']))}."
    return "The license of the original model is not known. Find it out before you use this."


def _link(repo: str) -> str:
    return f"[{repo}]({HUB}/{repo})" if "/" in repo else f"`{repo}`"
