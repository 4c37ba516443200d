"""What is said of a rewritten data set: how many rows were accepted, why others were not, and what it cost."""

from __future__ import annotations

from hfsd.findings import Results
from hfsd.records import TrainSet, Variant
from hfsd.units import duration, percent, plural

REASONS = {
    "kept": "the original's own words are used",
    "wrong answer": "the final answers differ",
    "truncated": "cut off by the token limit",
    "echo": "repeats a heading of the prompt",
    "too long": "much longer than the reference",
    "unlike": "has too little in common with the reference",
    "unlikely": "less likely under the original than the reference",
    "leak": "speaks of the reference or of the task of responding",
    "empty": "no text came",
    "failed": "the engine gave up on the row",
}


def data_sentence(name: str, train_set: TrainSet) -> str:
    """Acceptance, tokens and change of length of a rewritten set, in plain text."""
    change = train_set.rewrite_chars / train_set.reference_chars - 1 if train_set.reference_chars else 0.0
    sampling = ", ".join(f"{k} {v}" for k, v in sorted(train_set.sampling.items()) if v is not None)
    others = "the reference answer in the others" if train_set.on_reject == "reference" else "the others left both sets"
    rate = train_set.tokens_per_second
    told = (
        f"{name}: the original's own words are used in {percent(train_set.kept_fraction)} of "
        f"{plural(train_set.rows, 'row')}, {others}. Mode {train_set.mode}, engine {train_set.engine}"
        f"{f' ({sampling})' if sampling else ''}, {train_set.n_tokens:,} tokens in {duration(train_set.seconds)}"
        f"{f' ({rate:,.1f} per second)' if rate else ''}. All rewrites, those not used included, are "
        f"{abs(100 * change):.0f}% {'longer' if change >= 0 else 'shorter'} than the references, in characters."
    )
    if train_set.rewrite_nats is not None and train_set.reference_nats is not None:
        told += (
            f" Given the prompt alone, the original's loss on all of them is {train_set.rewrite_nats:.2f} nats per "
            f"token, on the references {train_set.reference_nats:.2f}."
        )
    return told


def reasons_table(train_set: TrainSet) -> list[list[str]]:
    """Header row, then rows of the set by reason, the accepted first; the others say what came of the row."""
    fate = "the row is left out" if train_set.on_reject == "drop" else "the reference is used"
    meanings = {reason: told if reason == "kept" else f"{told}, so {fate}" for reason, told in REASONS.items()}
    order = sorted(train_set.reasons.items(), key=lambda r: (r[0] != "kept", -r[1], r[0]))
    rows = [[r, str(n), percent(n / max(1, train_set.rows)), meanings.get(r, "")] for r, n in order]
    return [["reason", "rows", "share", "meaning"], *rows]


def train_set_of(results: Results, variant: Variant) -> TrainSet | None:
    """The set an arm was trained on: by the name of its data, or the only one there is."""
    sets = results.train_sets
    found = sets.get(variant.data or "") or sets.get(variant.id)
    return found or (next(iter(sets.values())) if len(sets) == 1 else None)
