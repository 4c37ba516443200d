"""The commands for single stages by hand, and those that write recipes: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from hfsd import arguments, processes
from hfsd.arguments import DataArg, Debug, Json, ModelArg, NewFolder, RemoteCode, Sets
from hfsd.errors import BadRequest, nearest
from hfsd.terminal import print_rewrites, spoken

commands = typer.Typer()


@commands.command()
def scan(
    model: ModelArg,
    calibration: Annotated[
        str, typer.Option("--calibration", help="Text to score on: as for DATA elsewhere, or .txt.")
    ],
    out: NewFolder,
    blocks: Annotated[int, typer.Option("--blocks", help="How many blocks to choose; 0: only score.")] = 0,
    rows: Annotated[int | None, typer.Option("--rows", help="Sequences to score (128).")] = None,
    max_length: Annotated[int | None, typer.Option("--max-length", help="Tokens per sequence (512).")] = None,
    widths: Annotated[
        str | None, typer.Option("--widths", metavar="START:STOP", help="Widths to report, half-open (all).")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="angular or bi (angular).")] = None,
    tokens: Annotated[str | None, typer.Option("--tokens", help="last or all text tokens (all).")] = None,
    select: Annotated[str | None, typer.Option("--select", help="verified or lowest (verified).")] = None,
    search: Annotated[str | None, typer.Option("--search", help="contiguous or greedy (contiguous).")] = None,
    trust_remote_code: RemoteCode = False,
    sets: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Score every range of blocks and choose the one to remove."""
    with spoken(debug, as_json) as say:
        from hfsd import single

        given = {"rows": rows, "max_length": max_length, "widths": widths, "metric": metric}
        given |= {"tokens": tokens, "select": select, "search": search}
        if not blocks and (select or search):
            raise BadRequest("--select and --search choose what to remove: say how much with --blocks COUNT")
        arguments.refuse_existing(out)
        cut = {"blocks": blocks}
        found = single.scan(arguments.recipe(model, calibration, cut, given, trust_remote_code, sets), out)
        sentence = found.plan.sentence if found else f"scored every range; {out / 'scores.png'} shows them"
        print(sentence)
        say(scores=str(out / "scores.json"), kept=list(found.plan.kept) if found else None, sentence=sentence)


@commands.command()
def prune(
    model: ModelArg,
    out: NewFolder,
    remove: Annotated[
        str | None, typer.Option("--remove", metavar="START:STOP", help="Blocks to remove, 0-based and half-open.")
    ] = None,
    keep: Annotated[str | None, typer.Option("--keep", help="Blocks that stay, such as 0,1,4:10.")] = None,
    blocks: Annotated[
        int | None, typer.Option("--blocks", help="How many blocks to remove, chosen by a scan; 0: a copy.")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option("--calibration", help="Text for the scan that --blocks needs.")
    ] = None,
    check: Annotated[str | None, typer.Option("--check", help="Self-check: auto, structure or numeric (auto).")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option("--max-shard-size", help="Largest file of the result (5GB).")
    ] = None,
    trust_remote_code: RemoteCode = False,
    sets: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a checkpoint without some of its blocks, and check it against the original."""
    with spoken(debug, as_json) as say:
        from hfsd import single

        if [blocks, remove, keep].count(None) != 2:
            raise BadRequest("give one of --blocks COUNT, --remove START:STOP and --keep BLOCKS")
        asked = {"blocks": blocks, "remove": remove, "keep": keep, "check": check, "max_shard_size": max_shard_size}
        # A recipe names data; where no scan is asked for, none is read.
        cut = {k: v for k, v in asked.items() if v is not None}
        made = arguments.recipe(model, calibration or "none.jsonl", cut, {}, trust_remote_code, sets)
        if blocks and calibration is None:
            raise BadRequest(
                "--blocks chooses by a scan: give --calibration DATA, or name blocks with --remove or --keep"
            )
        first = processes.rank() == 0
        if first:
            arguments.refuse_existing(out)
        found = single.scan(made) if blocks else None
        if not first:  # all of a launcher's processes scan, the first one cuts
            return
        done = single.prune(made.model, out, made.prune, found.plan if found else None)
        print(done.plan.sentence)
        for level in done.checks:
            print(f"self-check {level.level}: {level.result}{f'. {level.detail}' if level.detail else ''}")
        say(checkpoint=str(out), params=done.params, sentence=done.plan.sentence, seconds=done.seconds)


@commands.command()
def rewrite(
    model: Annotated[str, typer.Argument(help="As elsewhere; with --show and no DATA: a run, or its rewrite folder.")],
    data: Annotated[str | None, typer.Argument(help="As elsewhere.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="New folder for the result.")] = None,
    task: Annotated[str, typer.Option("--task", help="instruction, math or code.")] = "instruction",
    mode: Annotated[str | None, typer.Option("--mode", help="reference, few-shot, self or best.")] = None,
    rows: Annotated[int, typer.Option("--rows", help="Rows to rewrite, after the split.")] = 1000,
    show: Annotated[int, typer.Option("--show", help="Print this many rewrites beside their references.")] = 0,
    sets: Sets = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Have the unpruned model answer a training set in its own words, or look at what it wrote."""
    with spoken(debug, as_json) as say:
        from hfsd import rewrite as rewriting

        if data is None:
            if not show:
                raise BadRequest("give the DATA to rewrite, or --show COUNT to look at the rewrites of a run")
            root = Path(model)
        else:
            if out is None:
                raise BadRequest("give a folder for the rewrites: --out FOLDER")
            asked = {
                "model": model,
                "data": {"source": data, "rows": rows},
                "rewrite": {"task": task} | ({"mode": mode} if mode else {}),
                "prune": {"remove": "0:1"},  # a recipe names a cut; rewriting does not depend on it
            }
            root = arguments.run_alone(out, asked, sets, "rewrite")
        folder = root / "rewrite" if (root / "rewrite").is_dir() else root
        if not (folder / "stats.json").is_file():
            raise BadRequest(f"{root} holds no finished rewrites; run `hfsd rewrite MODEL DATA --out {root}` first")
        stats = json.loads((folder / "stats.json").read_text(encoding="utf-8"))
        if show:
            print_rewrites(rewriting.read(folder), show)
        reasons = ", ".join(f"{n} {reason}" for reason, n in stats["reasons"].items())
        print(f"{stats['rows']} rows: {reasons}; all of them: {folder / 'rewrites.jsonl'}")
        say(**stats)


@commands.command()
def merge(
    parts: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Two or more models of one cut.")],
    out: NewFolder,
    method: Annotated[str, typer.Option("--method", help="slerp, or another method by mergekit's name.")] = "slerp",
    t: Annotated[
        list[str] | None,
        typer.Option("--t", help="Share of the second of two models (0.5); of several, the least loss is kept."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Held-out rows to score merges on; DATA as elsewhere.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, help="How many of them, from the first.")] = 64,
    base: Annotated[
        str | None, typer.Option("--base", help="What all were tuned from, for methods that merge differences.")
    ] = None,
    parameters: Annotated[
        list[str] | None,
        typer.Option("--parameter", metavar="NAME=VALUE", help="Another one of the method, such as density=0.5."),
    ] = None,
    trust_remote_code: RemoteCode = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Merge models that were tuned from one checkpoint into one."""
    with spoken(debug, as_json) as say:
        from hfsd import single
        from hfsd.progress import quiet

        quiet()
        shares, further = arguments.numbers("--t", t or ["0.5"]), arguments.pairs("--parameter", parameters)
        done = single.merge(parts, out, method, shares, data, rows, base, further, trust_remote_code)
        print(f"{done.sentence}; in {out}")
        say(checkpoint=str(out), report=done)


@commands.command()
def init(
    model: ModelArg,
    data: DataArg,
    blocks: Annotated[int, typer.Option("--blocks", help="How many blocks to remove.")] = 6,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a commented recipe for a model and a data set, to be redirected into a file."""
    with spoken(debug, as_json) as say:
        from hfsd import starter

        text = starter.recipe_for(model, data, blocks)
        if not as_json:
            print(text, end="")
        say(recipe=text)


@commands.command()
def recipe(
    name: Annotated[
        str | None, typer.Argument(help="A packaged recipe, or a config for `accelerate launch`; none: list them.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Print a packaged recipe or accelerate config, or the names of all."""
    with spoken(debug, as_json) as say:
        from hfsd import recipes

        known, launchers = recipes.packaged(), recipes.launchers()
        if name is None:
            text = "\n".join([*known, *(f"{one} (for accelerate launch)" for one in launchers)]) + "\n"
        elif name in known:
            text = recipes.source_text(name)[0]
        elif name in launchers:
            text = recipes.launcher_text(name)
        else:
            every = [*known, *launchers]
            raise BadRequest(f"no packaged recipe '{name}'{nearest(name, every)}; there are {', '.join(every)}")
        if not as_json:
            print(text, end="")
        say(recipes=known, launchers=launchers, **({} if name is None else {"recipe": text}))
