"""Prune decoder blocks out of a language model and bring its quality back by self-data distillation.

`hfsd.run("recipe.yaml")` goes the whole way; `hfsd.results(run)` reads what it found, `hfsd.push(run, "NAME")`
publishes it and `hfsd.load_family("NAME/MODEL")` loads what was published, on one set of weights. Each stage is one
function: `hfsd.scan.run`, `hfsd.prune.run`, `hfsd.rewrite.run`, `hfsd.train.run`, `hfsd.merge.run`,
`hfsd.evaluate.run`, `hfsd.compare.run`, `hfsd.report.write`, `hfsd.publish.run`.
Everything is imported when it is first used, so that `import hfsd` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hfsd.records import STAGES

if TYPE_CHECKING:
    from hfsd.family import Family
    from hfsd.loading import load_family
    from hfsd.pipeline import push, results, run

__version__ = "0.1.0"
__all__ = ["STAGES", "Family", "__version__", "load_family", "push", "results", "run"]

_HOMES = {"run": "pipeline", "results": "pipeline", "push": "pipeline", "Family": "family", "load_family": "loading"}


def __getattr__(name: str) -> Any:
    if name in STAGES:
        return importlib.import_module(f"hfsd.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"hfsd.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'hfsd' has no attribute '{name}'")


def __dir__() -> list[str]:
    return [*__all__, *STAGES]
