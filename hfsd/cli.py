"""The command line: whole runs and their results. Single stages are in `cli_stages`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from hfsd.arguments import Debug, Json, Out, RecipeArg, RunArg, Sets
from hfsd.cli_stages import commands
from hfsd.terminal import numbers, print_results, print_table, spoken

app = typer.Typer(
    help="Prune decoder blocks out of a language model and bring its quality back by self-data distillation.",
    epilog="Start with: hfsd run demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def run(
    recipe: RecipeArg,
    sets: Sets = None,
    out: Out = None,
    until: Annotated[str | None, typer.Option(help="Stop after this stage.")] = None,
    redo: Annotated[str | None, typer.Option(help="Make this stage, and those that depend on it, again.")] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash finished outputs again instead of trusting size and time.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a recipe from scan to publish, or continue where an earlier run stopped."""
    with spoken(debug, as_json) as say:
        from hfsd import pipeline

        root = pipeline.run(recipe, sets, out, until, redo, verify)
        if (root / "report" / "DONE.json").is_file() and until in (None, "report", "publish"):
            found = pipeline.results(root)
            print_results(found, root)
            say(run=str(root), **numbers(found))
        else:
            say(run=str(root), until=until)


def _up_to(command: str, stage: str, what: str) -> None:
    """Adds a command that runs a recipe up to and including one stage."""

    @app.command(name=command, help=f"Run a recipe up to and including {what}.")
    def run_up_to(
        recipe: RecipeArg, sets: Sets = None, out: Out = None, as_json: Json = False, debug: Debug = False
    ) -> None:
        with spoken(debug, as_json) as say:
            from hfsd import pipeline

            root = pipeline.run(recipe, sets, out, until=stage)
            print(f"{stage} is done in {root}")
            say(run=str(root), until=stage)


_up_to("train", "train", "the training of its arms")
_up_to("eval", "evaluate", "the evaluation of its variants")
_up_to("compare", "compare", "the comparison of its variants with the original")


@app.command()
def plan(
    recipe: RecipeArg,
    sets: Sets = None,
    tokens_per_second: Annotated[
        float | None,
        typer.Option("--tokens-per-second", min=0, help="Forward passes of the original, instead of a probe."),
    ] = None,
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Measure this device for about 30 seconds, for the times.")
    ] = True,
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a recipe needs before it runs: parameters, FLOPs, memory, disk and time.

    Reads configs, and no weights; a GGUF file, or one in a package, is fetched and dequantised once for its config.
    """
    with spoken(debug, as_json) as say:
        from hfsd import plan as planning
        from hfsd import recipes
        from hfsd.progress import quiet

        quiet()
        made = planning.make(recipes.load(recipe, sets)[0], tokens_per_second, probe, out)
        print(planning.text(made))
        say(plan=made)


@app.command()
def sweep(
    recipe: RecipeArg,
    over: Annotated[
        list[str],
        typer.Option("--over", metavar="A.B=V1,V2", help="A curve over these values of a field; repeatable."),
    ],
    sets: Sets = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the sweep (default: runs/NAME-sweep).")] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a recipe at several values of a field, sharing what does not change, and draw quality over the value."""
    with spoken(debug, as_json) as say:
        from hfsd import sweep as sweeping

        found = sweeping.run(recipe, over, sets, out)
        print(sweeping.text(found))
        say(sweep=found)


@app.command()
def report(run: RunArg, as_json: Json = False, debug: Debug = False) -> None:
    """Print the table of a finished run."""
    with spoken(debug, as_json) as say:
        from hfsd import pipeline

        found = pipeline.results(run)
        print_results(found, run)
        say(run=str(run), **numbers(found))


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A finished run directory, or a checkpoint of `hfsd prune`.")],
    to: Annotated[
        str, typer.Option("--to", help="Hub namespace, yours or an organisation's; of a checkpoint NS/NAME.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Create private repos.")] = False,
    only: Annotated[str | None, typer.Option("--only", help="Of models,dataset,space.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Write the folders and print the plan; send nothing.")
    ] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="Commit to this branch (main).")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open pull requests instead of committing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite repos that somebody else has changed.")] = False,
    license_: Annotated[
        str | None, typer.Option("--license", metavar="ID", help="Of original and data, where it is not known.")
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Download all of it again, load it, compare logits.")
    ] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a finished run: models with adapters, data set, Space and collection, each with its card."""
    with spoken(debug, as_json) as say:
        from hfsd import pipeline, sending

        parts = tuple(part.strip() for part in only.split(",")) if only else ()
        asked = sending.Asked(private, parts, revision, create_pr, force, license_, dry_run, verify)
        done = pipeline.pushed(run, to, asked)
        if dry_run:
            print_table(sending.table(done.plan))
            print(sending.summary(done.plan))
        for receipt in done.receipts:
            print(f"{receipt.kind:<10} {receipt.url}  {receipt.commit[:12]}")
        say(plan=done.plan, receipts={r.repo: r.commit for r in done.receipts})


@app.command(name="list")
def list_families(
    namespace: Annotated[str, typer.Argument(help="A user or an organisation of the Hub.")],
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """List the families of a namespace: their originals, cuts, arms and recoveries."""
    with spoken(debug, as_json) as say:
        from hfsd import listing

        found = listing.families(namespace)
        for line in found:
            print(line.sentence)
        say(families=found)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Any repo of a family, its collection, or its address.")],
    out: Out = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Fetch the records of a published run, for `hfsd report`. No weights."""
    with spoken(debug, as_json) as say:
        from hfsd import listing

        root = listing.pull(name, out)
        print(f"the records are in {root}; see {root / 'report' / 'index.html'}, or: hfsd report {root}")
        say(run=str(root))


@app.command()
def space(
    run: RunArg,
    port: Annotated[int, typer.Option("--port", help="Port on 127.0.0.1.")] = 7860,
    share: Annotated[bool, typer.Option("--share", help="Ask Gradio for a public link.")] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Serve the staged Space of a finished run on this machine."""
    with spoken(debug, as_json) as say:
        from hfsd import pipeline

        folder = pipeline.staged_space(run)
        say(folder=str(folder), url=f"http://127.0.0.1:{port}")
    options = ["--port", str(port)] + ["--share"] * share + ["--open"] * open_page
    os.chdir(folder)
    sys.stdout.flush()
    # In place of this process, so that Ctrl-C reaches the page.
    os.execv(sys.executable, [sys.executable, "app.py", *options])


app.add_typer(commands)


def main() -> None:
    """Entry point of the `hfsd` script."""
    # A tool must not report on its users; this has to be set before the Hub's client is imported.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    # Where it is installed, PEFT imports it, and it tells each time which kernels a CPU does without.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app()
