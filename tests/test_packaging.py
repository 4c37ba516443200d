"""A wheel, installed outside of the checkout, runs a tiny recipe to its end, cards and staged Space included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from hfsd import recipes
from tests import tiny
from tests.hub import hub_env
from tests.hub.server import LoopbackHub

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("build", reason="building a wheel needs the package 'build' (extra dev)")
    pytest.importorskip("hatchling", reason="building a wheel offline needs hatchling (extra dev)")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (made,) = out.glob("*.whl")
    return made


def test_the_wheel_carries_what_the_code_reads(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    tree = {
        p.relative_to(ROOT).as_posix() for p in (ROOT / "hfsd").rglob("*") if p.suffix in (".py", ".yaml", ".typed")
    }
    assert tree <= names
    for kind in ("cards", "space"):
        files = [p for p in (ROOT / kind).rglob("*") if p.is_file() and "__pycache__" not in p.parts]
        assert files and {f"hfsd/_assets/{p.relative_to(ROOT).as_posix()}" for p in files} <= names
    assert not [n for n in names if n.startswith(("tests/", "runs/")) or "__pycache__" in n]


def test_the_wheel_runs_a_recipe_to_its_end(wheel: Path, model_folder: Path, tmp_path: Path) -> None:
    # An environment that has the dependencies of this one and, of hfsd, nothing but the wheel.
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    site = Path(
        subprocess.check_output([python, "-c", "import site; print(site.getsitepackages()[0])"], text=True).strip()
    )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run(pip, check=True, timeout=120)
    outer = [p for p in sys.path if p.endswith("-packages")]
    (site / "outer.pth").write_text("\n".join(outer) + "\n")
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(recipes.dump(tiny.recipe(model_folder, data__rows=4))))
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    where = subprocess.check_output(
        [python, "-c", "import hfsd; print(hfsd.__file__)"], text=True, cwd=tmp_path, env=env
    )
    assert where.startswith(str(site))
    command = [python, "-c", "from hfsd.cli import main; main()", "run", "tiny.yaml", "--out", "run", "--json"]
    with LoopbackHub(tmp_path / "hub") as hub:  # online, with a Hub and a proxy that write down who asks
        env = hub_env(hub, None, tmp_path / "home")
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        assert not hub.calls and not hub.strays(), "a run on local files asked the network"
    assert json.loads(done.stdout.splitlines()[-1])["ok"]
    (space,) = (tmp_path / "run" / "publish").glob("*-compare")
    assert {"app.py", "README.md", "family.json", "requirements.txt", "hfsd"} <= {p.name for p in space.iterdir()}
    assert "base_model:" in next((tmp_path / "run" / "publish").glob("*-self-distilled-*/README.md")).read_text()


def test_assets_are_found_in_an_editable_install_too() -> None:
    from hfsd.assets import assets
    from hfsd.errors import HfsdError

    assert (assets("cards") / "model.md.j2").is_file() and (assets("space") / "app.py").is_file()
    with pytest.raises(HfsdError, match="no assets named 'spaces'"):
        assets("spaces")
