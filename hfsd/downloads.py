"""The last look at a push: everything is downloaded to an empty cache, hashed, loaded, and compared in its logits."""

from __future__ import annotations

import tempfile
from pathlib import Path

from hfsd import hub, models
from hfsd.errors import HfsdError
from hfsd.records import Receipt
from hfsd.rundir import sha256

TOKENS = 64  # of the made-up text whose logits are compared
CLOSE = 1e-4


def check(receipt: Receipt, folder: Path, cache: Path | None = None, trust_remote_code: bool = False) -> str:
    """What a receipt names, as it comes down, against the folder that was sent.

    Args:
        cache: where the empty cache is made; None: the system's place for temporary files.

    Returns:
        What was compared.

    Raises:
        HfsdError: something else came down than was sent.
    """
    with tempfile.TemporaryDirectory(dir=cache) as place:
        there = hub.download(receipt.repo, receipt.kind, receipt.commit, Path(place))
        for path, digest in receipt.files.items():
            if not (there / path).is_file() or sha256(there / path) != digest:
                raise HfsdError(
                    f"{receipt.repo} at {receipt.commit[:12]}: {path} does not come down as it was sent; the Hub has "
                    "damaged it: delete the repo there and push again"
                )
        said = f"{len(receipt.files)} files as sent"
        if receipt.kind != "model" or not (folder / "config.json").is_file():
            return said
        apart = _apart(there, folder, trust_remote_code)
    if apart > CLOSE:
        raise HfsdError(f"{receipt.repo}: its logits are {apart:.2g} from those of {folder}; push again")
    return f"{said}, loads, logits within {apart:.1g}"


def _apart(one: Path, other: Path, trust_remote_code: bool) -> float:
    """The largest difference of two checkpoints' logits, on the CPU in float32."""
    import torch

    found = []
    for folder in (one, other):
        model = models.load(folder, "float32", trust_remote_code).to("cpu")
        ids = torch.arange(TOKENS)[None] % model.get_input_embeddings().num_embeddings  # [1, T]
        with torch.inference_mode():
            found.append(model(ids).logits)
        del model
    return float((found[0] - found[1]).abs().max())
