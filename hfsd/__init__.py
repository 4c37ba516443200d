"""Prune decoder blocks out of a language model and bring its quality back by self-data distillation.

`hfsd.run("recipe.yaml")` goes the whole way. Each stage is one function: `hfsd.scan`, `hfsd.prune`, `hfsd.rewrite`,
`hfsd.train`, `hfsd.evaluate`, `hfsd.compare`, `hfsd.report`, `hfsd.publish` are modules with a `run` or `write`.
Everything is imported when it is first used, so that `import hfsd` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hfsd.family import Family
    from hfsd.pipeline import results, run

__version__ = "0.1.0"
__all__ = ["Family", "__version__", "results", "run"]

_HOMES = {"run": "hfsd.pipeline", "results": "hfsd.pipeline", "Family": "hfsd.family"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'hfsd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
