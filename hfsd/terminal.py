"""What a command says and how it ends. Results go to stdout, progress and errors to stderr.

Exit codes: 0 done, 1 failed, 2 a bad request, 130 interrupted.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from hfsd import processes
from hfsd.errors import HfsdError

if TYPE_CHECKING:
    from rich.table import Table

    from hfsd.findings import Results
    from hfsd.records import Example, Rewrite, Variant

GAMMAS = (1, 4, 8)  # drafted tokens per pass of which the closing table tells; the report has all


@contextmanager
def spoken(debug: bool, as_json: bool) -> Iterator[Callable[..., None]]:
    """Turns errors into one line and an exit code; yields a function that keeps the closing JSON line."""
    closing: dict[str, Any] = {}
    if processes.rank():  # of several processes, the first one speaks; each tells its own errors
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    try:
        yield closing.update
        processes.leave()
    except HfsdError as error:
        _fail(error, error.exit_code, str(error), debug, as_json)
    except KeyboardInterrupt as error:
        _fail(error, 130, "interrupted; run the same command again to continue", debug, as_json)
    except Exception as error:
        _fail(
            error,
            1,
            f"{type(error).__name__}: {' '.join(str(error).split())[:400]}; --debug shows where",
            debug,
            as_json,
        )
    if as_json:
        from hfsd.plain import to_json

        print(json.dumps({"ok": True, **to_json(closing)}))


def print_results(results: Results, root: Path) -> None:
    """The closing table, where everything lies, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    from hfsd.rundir import merged_folder
    from hfsd.text import (
        PAIRED_NOTE,
        cost_notes,
        cost_table,
        draft_notes,
        draft_table,
        headline,
        notes,
        paired_table,
        seeds_table,
        table,
    )

    console = Console(highlight=False, markup=False)
    console.print(f"\n{headline(results)}\n", style="bold")
    # One column per variant: four scores with their intervals fit into 80 characters, nine of them would not.
    _, *figures = zip(*table(results), strict=True)
    shown = Table(show_lines=True, padding=0)
    shown.add_column(overflow="fold")
    for line in results.variants:
        shown.add_column("\n".join(_name_lines(line.variant)), overflow="fold")
    for name, *values in figures:
        shown.add_row(name, *(value.replace(" [", "\n[") for value in values))
    console.print(shown)
    for note in notes(results):
        console.print(f"- {note}")
    for arm, seeds, mean, share in seeds_table(results)[1:]:
        console.print(f"- {arm} over seeds {seeds}: mean {mean} %, recovery {share} %")
    if pairs := paired_table(results, "sft"):
        console.print(_rich("Differences from sft", pairs))
    if results.paired:
        console.print(f"- {PAIRED_NOTE}")
    drafts = [list(row) for row in zip(*draft_table(results, GAMMAS), strict=True)]  # as narrow as the first table
    for title, rows, said in (
        ("As drafts for the original", drafts, draft_notes(results)),
        ("Cost", cost_table(results), cost_notes(results)),
    ):
        if rows:
            console.print(_rich(title, rows))
        for note in said:
            console.print(f"- {note}")
    if (root / "family.json").is_file():  # fetched by `hfsd pull`: the models are where it says
        print(f"\nreport    {root / 'report' / 'index.html'}\nrecipe    {root / 'recipe.yaml'}")
        print(f'\nload its models:\n  import hfsd\n  family = hfsd.load_family("{root}")')
        return
    arms = [v.variant.id for v in results.variants if v.variant.arm not in ("original", "pruned")]
    print(
        f"\nreport    {root / 'report' / 'index.html'}\nmodels    {root / 'publish'}\nrecipe    {root / 'recipe.yaml'}"
    )
    if arms:
        merged = merged_folder(root, arms[-1])
        print("\nload the recovered model:")
        print("  from transformers import AutoModelForCausalLM, AutoTokenizer")
        print(f'  model = AutoModelForCausalLM.from_pretrained("{merged}")')
        print(f'  tokenizer = AutoTokenizer.from_pretrained("{merged}")')
    print(f"compare side by side:  hfsd space {root}\npublish:               hfsd push {root} --to NAME")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Rows with their header on the terminal."""
    from rich.console import Console

    Console(highlight=False, markup=False).print(_rich("", rows))


def _rich(title: str, rows: Sequence[Sequence[str]]) -> Table:
    from rich.table import Table

    shown = Table(title=title, title_justify="left", padding=0)
    for head in rows[0]:
        shown.add_column(head, overflow="fold")
    for row in rows[1:]:
        shown.add_row(*row)
    return shown


def _name_lines(variant: Variant) -> list[str]:
    seed = "" if variant.seed is None else f"seed {variant.seed}"
    return [part for part in (variant.arm, variant.data, seed) if part]


def print_rewrites(pairs: Sequence[tuple[Example, Rewrite]], count: int) -> None:
    """References and rewrites side by side, accepted and rejected ones in turn; words of one side only are coloured."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, markup=False)
    for example, rewrite in _in_turn(pairs)[:count]:
        reference, text = Text(), Text()
        mine, theirs = (re.findall(r"\S+|\s+", t) for t in (example.reference, rewrite.text))
        for kind, a, b, c, d in difflib.SequenceMatcher(None, mine, theirs, autojunk=False).get_opcodes():
            reference.append("".join(mine[a:b]), style=None if kind == "equal" else "red")
            text.append("".join(theirs[c:d]), style=None if kind == "equal" else "green")
        shown = Table(title=f"{example.id}  {rewrite.reason}", title_justify="left", expand=True)
        shown.caption = " ".join(example.prompt.split())[:300]
        shown.add_column("reference", ratio=1, overflow="fold")
        shown.add_column(f"rewrite ({rewrite.mode})", ratio=1, overflow="fold")
        shown.add_row(reference, text)
        if rewrite.nats is not None and rewrite.reference_nats is not None:
            shown.add_row(f"{rewrite.reference_nats:.2f} nats per token", f"{rewrite.nats:.2f} nats per token")
        console.print(shown)


def _in_turn(pairs: Sequence[tuple[Example, Rewrite]]) -> list[tuple[Example, Rewrite]]:
    """An accepted one, a rejected one, and so on; then what is left."""
    sides: tuple[list[Any], list[Any]] = ([], [])
    for pair in pairs:
        sides[not pair[1].kept].append(pair)
    return [pair for two in zip_longest(*sides) for pair in two if pair is not None]


def numbers(results: Results) -> dict[str, Any]:
    """The closing numbers of `--json`: means, recoveries with their bounds, and what the differences say."""
    return {
        "variants": {
            v.variant.id: {
                "params": v.params,
                "mean": v.mean,
                "recovery": v.recovery,
                "mean_of_ratios": v.mean_of_ratios,
                "chance_corrected": v.chance_corrected,
            }
            for v in results.variants
        },
        "paired": results.paired,
    }


def _fail(error: BaseException, code: int, message: str, debug: bool, as_json: bool) -> None:
    if debug:
        raise error
    for line in message.splitlines():
        print(f"hfsd: {line}", file=sys.stderr)
    if as_json:
        print(json.dumps({"ok": False, "exit_code": code, "error": message}))
    raise typer.Exit(code) from None
