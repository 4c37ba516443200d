"""How alike two texts are, 0 to 1: by words in common, or by an embedding model of the user's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from hfsd import checks, hub
from hfsd.errors import BadRequest

Similarity = Callable[[Sequence[str], Sequence[str]], list[float]]
WORDS = "ROUGE-1"  # the name of the measure that needs no model


def overlaps(texts: Sequence[str], references: Sequence[str]) -> list[float]:
    """The similarity that needs no model: words in common."""
    return [checks.overlap(text, reference) for text, reference in zip(texts, references, strict=True)]


def similarity(name: str | None, stage: str) -> Similarity:
    """Words in common, or the cosine of the model's embeddings where that is positive.

    Args:
        name: folder or Hub id of a sentence-transformers model; None: no model.
        stage: the recipe's block that asks, for errors.

    Raises:
        BadRequest: sentence-transformers is not installed, or cannot load the model.
    """
    if name is None:
        return overlaps
    asked_by, path = f"{stage}.similarity_model", Path(name).expanduser()
    if not path.is_dir() and (path.is_absolute() or name.startswith(".") or not hub.is_repo_id(name)):
        raise BadRequest(f"{asked_by}: no folder {name}, and it is no Hub id such as org/name")
    try:
        from safetensors import SafetensorError
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise BadRequest(
            f"{asked_by} needs sentence-transformers: pip install 'hfsd[embed]'; "
            "without a model, similarity is the overlap of words"
        ) from None
    try:
        model = SentenceTransformer(str(path) if path.is_dir() else name)
    except (OSError, ValueError, SafetensorError) as error:
        raise BadRequest(
            f"{asked_by}: cannot load {name} ({' '.join(str(error).split())[:300]}); "
            "give the folder or the Hub id of a sentence-transformers model"
        ) from error

    def cosines(texts: Sequence[str], references: Sequence[str]) -> list[float]:
        rows = model.encode([*texts, *references], normalize_embeddings=True, show_progress_bar=False)
        pairs = zip(rows[: len(texts)], rows[len(texts) :], strict=True)
        return [max(0.0, float(one @ other)) for one, other in pairs]

    return cosines
