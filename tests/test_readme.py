"""The README cannot drift: its two lines are what CI runs, and every command in it exists."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hfsd import recipes
from hfsd.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINES = ["pip install -e '.[demo]' && hfsd run demo", "pip install -e '.[dev]' && pytest"]


def _commands() -> list[str]:
    """Every `hfsd ...` line of the README's shell blocks."""
    blocks = re.findall(r"```(?:bash|sh|console)\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    parts = [part.strip() for line in lines for part in line.split("&&")]
    return sorted({p for p in parts if p.startswith("hfsd ")})


def test_the_two_lines_stand_early_and_ci_runs_them() -> None:
    head = "\n".join(README.splitlines()[:40])
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    for line in LINES:
        assert line in head and line in ci


def test_the_readme_shows_commands() -> None:
    assert len(_commands()) >= 6


@pytest.mark.parametrize("command", _commands())
def test_every_command_of_the_readme_parses(command: str) -> None:
    words = shlex.split(re.sub(r"\s>\s.*", "", command))[1:]
    if words == ["--help"]:
        words = []
    result = CliRunner().invoke(app, [*words, "--help"])
    assert result.exit_code == 0, result.output
    known = CliRunner().invoke(app, [words[0], "--help"]).output if words else ""
    for option in [w for w in words if w.startswith("--") and w != "--help"]:
        assert option in known, f"{command}: no option {option}"
    if words[:1] == ["run"] and not words[1].endswith(".yaml"):
        assert words[1] in recipes.packaged()


def test_no_machine_paths_or_registry_hosts_in_the_tree() -> None:
    here = [
        p for p in ROOT.rglob("*") if p.is_file() and p.suffix in (".py", ".md", ".yaml", ".toml", ".j2", ".txt", "")
    ]
    skipped = {".git", "runs", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "build", "dist"}
    bad = re.compile(r"/" + r"work/|files\.python" + r"hosted|registry\.npm" + "js")
    for path in here:
        if skipped.isdisjoint(path.relative_to(ROOT).parts) and not path.name.endswith(".egg-info"):
            found = bad.search(path.read_text(encoding="utf-8", errors="ignore"))
            assert not found, f"{path.relative_to(ROOT)}: {found[0]}"


def test_every_module_has_its_place_in_the_readme() -> None:
    rows = README.split("| module (")[1].split("\n\n")[0]
    named = set(re.findall(r"`(\w+)`", "\n".join(line.split("|")[1] for line in rows.splitlines()[2:])))
    assert named == {p.stem for p in (ROOT / "hfsd").glob("*.py")} - {"__init__", "__main__"}
