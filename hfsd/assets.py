"""Finds what travels beside the code: templates of cards, and the Space."""

from __future__ import annotations

from pathlib import Path

from hfsd.errors import HfsdError

PACKAGE = Path(__file__).parent
KINDS = ("cards", "space")


def assets(kind: str) -> Path:
    """The folder `cards` or `space`: inside the package when installed from a wheel, else at the checkout's top level.

    Raises:
        HfsdError: neither folder is there.
    """
    if kind not in KINDS:
        raise HfsdError(f"no assets named {kind!r}; there are: {', '.join(KINDS)}")
    places = (PACKAGE / "_assets" / kind, PACKAGE.parent / kind)
    for place in places:
        if place.is_dir():
            return place
    raise HfsdError(f"the folder '{kind}' is neither in the installed package nor beside it; install hfsd again")
