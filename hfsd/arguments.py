"""What commands are given: the options that several share, and what is checked before a stage is called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hfsd.errors import BadRequest

if TYPE_CHECKING:
    from hfsd.recipe import Recipe

Json = Annotated[bool, typer.Option("--json", help="Close with one machine-readable line on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=C", help="Override a field of the recipe; repeatable.")
]
Out = Annotated[Path | None, typer.Option("--out", help="Run directory (default: runs/NAME).")]
NewFolder = Annotated[Path, typer.Option("--out", help="New folder for the result.")]
ModelArg = Annotated[str, typer.Argument(help="Hub id, folder, *.gguf file, or package:DIST==VERSION/FILE.")]
DataArg = Annotated[str, typer.Argument(help="gym:NAME, a .jsonl/.json/.csv/.parquet file, or a Hub dataset id.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code that the model's repo brings.")]
RecipeArg = Annotated[str, typer.Argument(help="A recipe file, or a packaged name (see `hfsd recipe`).")]
RunArg = Annotated[Path, typer.Argument(help="A finished run directory, such as runs/demo.")]


def recipe(
    model: str,
    calibration: str,
    cut: dict[str, Any],
    scan: dict[str, Any],
    trust_remote_code: bool,
    sets: list[str] | None,
) -> Recipe:
    """What a single stage is asked, checked as a recipe is; `--set` may add to the options, not contradict them."""
    from hfsd import recipes
    from hfsd.progress import quiet

    given = {"prune": cut, "scan": scan, "model": {"path": model}}
    options = {f"{block}.{name}" for block, fields in given.items() for name, value in fields.items() if value}
    for item in sets or []:
        if item.partition("=")[0] in options:
            raise BadRequest(f"--set {item} contradicts an option of this command; give one of them")
    asked: dict[str, Any] = {"name": "single", "data": calibration, "prune": cut}
    asked["model"] = {"path": model, "trust_remote_code": trust_remote_code}
    asked["scan"] = {k: v for k, v in scan.items() if v is not None}
    made = recipes.validate(asked, "arguments", sets)
    quiet()
    return made


def numbers(option: str, words: list[str]) -> list[float]:
    """Numbers of an option that may be repeated, hold a comma list, or both."""
    try:
        return [float(part) for word in words for part in word.split(",")]
    except ValueError:
        raise BadRequest(f"{option} {','.join(words)}: give numbers, such as 0.5 or 0.3,0.5,0.7") from None


def pairs(option: str, words: list[str] | None) -> dict[str, str]:
    """NAME=VALUE of an option that may be repeated."""
    found = dict(word.partition("=")[::2] for word in words or [])
    if bad := next((name for name, value in found.items() if not name or not value), None):
        raise BadRequest(f"{option} {bad}: write it as NAME=VALUE, such as density=0.5")
    return found


def refuse_existing(out: Path) -> None:
    """Told before anything is paid for."""
    if out.exists():
        raise BadRequest(f"{out} is there already; give another --out, or remove it first")


def run_alone(out: Path, asked: dict[str, Any], sets: list[str] | None, stage: str) -> Path:
    """Runs one stage of what is asked in the run directory `out`, checked as a recipe is."""
    from hfsd import pipeline, recipes
    from hfsd.blocks import slug

    made: Recipe = recipes.validate({"name": slug(out.name), **asked}, "arguments", sets)
    return pipeline.run(made, out=out, only=stage)
