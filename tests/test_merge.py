"""Merged checkpoints: exact arithmetic, stock files, sweeps that keep the best, and what does not merge."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

pytest.importorskip("mergekit", reason="merging needs mergekit (extra merge)")

from hfsd import alike, merge, models, shards
from hfsd.cli import app
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.plain import dumps, load
from hfsd.records import MergeReport, ModelRef, Provenance
from tests import architectures, tiny

N = 2  # blocks


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two models of one shape with numbers of their own, so that SLERP is far from linear."""
    folder = tmp_path_factory.mktemp("parts")
    return {name: tiny.llama(folder / name, N, seed) for seed, name in enumerate(("one", "two"))}


def _numbers(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def _rewritten(source: Path, target: Path, change: Any) -> Path:
    """A copy whose tensors are `change(name, tensor)`."""
    from safetensors.torch import save_file

    shutil.copytree(source, target)
    tensors = {name: change(name, tensor).contiguous() for name, tensor in _numbers(source).items()}
    save_file(tensors, target / shards.WEIGHTS, metadata={"format": "pt"})
    return target


def _slerp(a: Any, b: Any, t: float) -> Any:
    """The formula, in float64, with linear interpolation of nearly parallel ones."""
    import torch

    x, y = a.double().reshape(-1), b.double().reshape(-1)
    cosine = (x @ y / (x.norm() * y.norm())).clamp(-1, 1)
    if abs(cosine) > 0.9995:
        return ((1 - t) * x + t * y).reshape(a.shape)
    angle = torch.acos(cosine)
    mixed = torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y
    return (mixed / torch.sin(angle)).reshape(a.shape)


def _edited(source: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of a folder with keys of one JSON file changed."""
    shutil.copytree(source, target)
    data = json.loads((target / file).read_text(encoding="utf-8"))
    (target / file).write_text(json.dumps(data | changes), encoding="utf-8")
    return target


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(t=st.floats(0, 1))
def test_slerp_equals_the_formula(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, t: float) -> None:
    out = tmp_path_factory.mktemp("merged") / "out"
    made = merge.run(parts, out, t=[t])
    one, two, merged = (_numbers(f) for f in (*parts.values(), out))
    assert made.t == t and list(merged) == list(one)
    for name, tensor in merged.items():
        assert tensor.dtype == one[name].dtype
        assert (tensor.double() - _slerp(one[name], two[name], t)).abs().max() <= 1e-6, name


def test_the_ends_are_the_models(parts: dict[str, Path], tmp_path: Path) -> None:
    for t, end in zip((0.0, 1.0), parts.values(), strict=True):
        merge.run(parts, tmp_path / str(t), t=[t])
        merged, expected = _numbers(tmp_path / str(t)), _numbers(end)
        assert all(merged[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_result_is_a_stock_checkpoint_in_the_first_ones_files(tied: bool, dtype: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folders = {}
    for seed, name in enumerate(("one", "two")):
        model = AutoModelForCausalLM.from_pretrained(
            tiny.llama(tmp_path / f"{name}-whole", N, seed, tied), dtype=getattr(torch, dtype)
        )
        folders[name] = tmp_path / name
        model.save_pretrained(folders[name], max_shard_size="20KB" if seed == 0 else "5GB")
        tiny.tokenizer().save_pretrained(folders[name])
    (folders["one"] / "README.md").write_text("of the first")
    made = merge.run(folders, tmp_path / "out")
    first, out = folders["one"], tmp_path / "out"
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.dtype == getattr(torch, dtype)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    files = {p.name for p in first.iterdir()} - {"README.md"}
    assert {p.name for p in out.iterdir()} == files | {merge.REPORT} and len(list(out.glob("*.safetensors"))) > 1
    for name in files:
        if not name.endswith(".safetensors"):
            assert (out / name).read_bytes() == (first / name).read_bytes(), name
    headers = [[(t.name, t.dtype, t.shape, t.start) for t in shards.read(f)] for f in (first, out)]
    assert headers[0] == headers[1]
    assert load(MergeReport, out / merge.REPORT) == made and made.parts == ("one", "two") and made.losses == []


def test_a_sweep_keeps_the_best_and_nothing_else(parts: dict[str, Path], tmp_path: Path) -> None:
    seen: list[int] = []

    def score(model: Any) -> float:
        (building,) = (p for p in tmp_path.iterdir() if p.name.startswith(".out"))
        seen.append(len(list(building.rglob("*.safetensors"))))
        return {0.2: 3.0, 0.4: 1.5, 0.6: 1.5, 0.9: 2.0}[(0.2, 0.4, 0.6, 0.9)[len(seen) - 1]]

    made = merge.run(parts, tmp_path / "out", t=[0.2, 0.4, 0.6, 0.9], score=score)
    assert made.t == 0.4 and [(m.t, m.loss) for m in made.losses] == [(0.2, 3.0), (0.4, 1.5), (0.6, 1.5), (0.9, 2.0)]
    assert seen == [1, 2, 2, 2] and [p.name for p in tmp_path.iterdir()] == ["out"]
    merge.run(parts, tmp_path / "alone", t=[0.4])
    assert (tmp_path / "out" / shards.WEIGHTS).read_bytes() == (tmp_path / "alone" / shards.WEIGHTS).read_bytes()
    assert not [p for p in (tmp_path / "out").iterdir() if p.is_dir()]
    assert "3.0000 at t 0.2, 1.5000 at t 0.4" in made.sentence


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_failing_scorer_leaves_nothing(parts: dict[str, Path], tmp_path: Path, loss: float | None) -> None:
    def score(_: Any) -> float:
        if loss is None:
            raise RuntimeError("no rows")
        return loss

    with pytest.raises((HfsdError, RuntimeError), match="no rows|the loss of the merge at t 0.3 is (nan|inf)"):
        merge.run(parts, tmp_path / "new" / "out", t=[0.3, 0.5], score=score)
    assert not list(tmp_path.iterdir())


def test_linear_shares_are_exact(parts: dict[str, Path], tmp_path: Path) -> None:
    """Tensors that are parallel, antipodal, at about a right angle, and just inside and outside of the threshold."""
    import torch

    def change(name: str, tensor: Any) -> Any:
        if "q_proj" in name:  # half of the squares turn their sign: cos is near 0
            flat = tensor.flatten()
            return (flat * torch.where(torch.arange(flat.numel()) % 2 == 0, 1.0, -1.0)).reshape(tensor.shape)
        if "k_proj" in name:
            return -tensor  # antipodal is linear too
        if "v_proj" in name or "o_proj" in name:
            other = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
            other -= (other * tensor).sum() / (tensor * tensor).sum() * tensor
            cosine = 0.9994 if "v_proj" in name else 0.9996
            return cosine * tensor + math.sqrt(1 - cosine**2) * tensor.norm() / other.norm() * other
        return tensor * 3 if "mlp" in name else tensor

    folders = {"one": parts["one"], "two": _rewritten(parts["one"], tmp_path / "two", change)}
    made = merge.run(folders, tmp_path / "out")
    numbers = _numbers(parts["one"])
    spherical = {name for name in numbers if "q_proj" in name or "v_proj" in name}
    params = sum(tensor.numel() for tensor in numbers.values())
    assert made.linear_tensors == (len(numbers) - len(spherical)) / len(numbers) and len(spherical) == 2 * N
    assert made.linear_params == 1 - sum(numbers[name].numel() for name in spherical) / params
    assert f"fell back to linear on {made.linear_tensors:.1%} of tensors" in made.sentence
    two, merged = _numbers(folders["two"]), _numbers(tmp_path / "out")
    for name, tensor in merged.items():
        assert (tensor.double() - _slerp(numbers[name], two[name], 0.5)).abs().max() <= 1e-6, name


@pytest.mark.parametrize(("method", "weights"), [("linear", (0.75, 0.25)), ("task_arithmetic", (0.75, 0.25))])
def test_other_methods_take_t_as_their_weights(
    parts: dict[str, Path], tmp_path: Path, method: str, weights: tuple[float, float]
) -> None:
    base = tiny.llama(tmp_path / "base", N, 7) if method == "task_arithmetic" else None
    made = merge.run(parts, tmp_path / "out", method, [0.25], base=base)
    start = {} if base is None else _numbers(base)
    one, two = (_numbers(f) for f in parts.values())
    for name, tensor in _numbers(tmp_path / "out").items():
        origin = start.get(name, 0 * tensor).double()
        expected = origin + weights[0] * (one[name].double() - origin) + weights[1] * (two[name].double() - origin)
        assert (tensor.double() - expected).abs().max() <= 1e-6, name
    assert made.linear_tensors is None and made.base == (None if base is None else "base")
    assert "linear on" not in made.sentence


def test_more_models_are_weighted_equally_and_drops_repeat(parts: dict[str, Path], tmp_path: Path) -> None:
    three = {**parts, "three": tiny.llama(tmp_path / "three", N, 3)}
    assert merge.run(three, tmp_path / "mean", "linear").t is None
    numbers = [_numbers(f) for f in three.values()]
    for name, tensor in _numbers(tmp_path / "mean").items():
        assert (tensor.double() - sum(n[name].double() for n in numbers) / 3).abs().max() <= 1e-6
    base = tiny.llama(tmp_path / "base", N, 7)
    made = [
        merge.run(three, tmp_path / out, "dare_ties", base=base, parameters={"density": "0.5"}) for out in ("a", "b")
    ]
    assert made[0].parameters == {"density": 0.5}
    assert (tmp_path / "a" / shards.WEIGHTS).read_bytes() == (tmp_path / "b" / shards.WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"method": "slrp"}, r"--method slrp: no such method \(did you mean 'slerp'\?\); there are .*linear"),
        ({"method": "ties"}, "--method ties merges what was learned: say what all were tuned from with --base MODEL"),
        ({"method": "passthrough"}, "--method passthrough with 2 models: .*exactly 1 inputs; got 2"),
        ({"method": "karcher", "t": [0.3]}, "--t 0.3: karcher of 2 models knows equal shares only; leave it out"),
        ({"t": [0.5, 1.5]}, "--t 0.5, 1.5: give different numbers from 0 to 1"),
        ({"t": [0.5, 0.5]}, "--t 0.5, 0.5: give different"),
        ({"t": []}, "--t : give different"),
        ({"t": [0.3, 0.5]}, "several t are told apart by held-out loss: say on which rows with --data"),
        ({"parameters": {"densty": "1"}}, "--parameter densty: slerp has no such parameter; it takes none beside --t"),
        (
            {"method": "ties", "base": "other", "parameters": {"densty": "1"}},
            r"ties has no such parameter \(did you mean 'density'\?\); it takes ",
        ),
        (
            {"method": "ties", "base": "other", "parameters": {"density": "half"}},
            "--parameter density=half: ties takes a float there",
        ),
    ],
)
def test_what_a_method_cannot_take_is_refused(
    parts: dict[str, Path], tmp_path: Path, asked: dict[str, Any], message: str
) -> None:
    other = {"base": tiny.llama(tmp_path / "other", N, 5)} if "base" in asked else {}
    with pytest.raises(BadRequest, match=message):
        merge.run(parts, tmp_path / "out", **(asked | other))
    assert not (tmp_path / "out").exists()


def test_counts_and_places_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    three = {**parts, "three": tiny.llama(tmp_path / "three", N, 3)}
    for models_given, method, message in (
        ({"one": parts["one"]}, "linear", "merging takes two or more models, and one was given"),
        (three, "slerp", "--method slerp with 3 models: .*exactly 2 inputs; got 3"),
        ({"one": parts["one"], "same": parts["one"] / ".." / "one"}, "slerp", "one is given twice"),
    ):
        with pytest.raises(BadRequest, match=message):
            merge.run(models_given, tmp_path / "out", method)
    with pytest.raises(BadRequest, match="holds .*, which is merged; give another --out"):
        merge.run(parts, parts["one"].parent)


def test_which_methods_take_a_base(parts: dict[str, Path], tmp_path: Path) -> None:
    takes = {
        m: merge.takes_base(m) for m in ("slerp", "linear", "karcher", "nearswap", "ties", "nuslerp", "model_stock")
    }
    assert [m for m, is_so in takes.items() if is_so] == ["ties", "nuslerp", "model_stock"]
    # A run has a base at hand whatever the method is; where it is not read, it is not compared either.
    made = merge.run(parts, tmp_path / "out", base=tmp_path / "nowhere")
    assert made.base is None


def test_without_mergekit_the_extra_is_named(
    parts: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [n for n in sys.modules if n == "mergekit" or n.startswith("mergekit.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "mergekit", None)
    with pytest.raises(BadRequest, match=r"merging needs mergekit: pip install 'hfsd\[merge\]'"):
        merge.run(parts, tmp_path / "out")


def _unlike(kind: str, source: Path, other: Path) -> tuple[Path, str]:
    """A model that does not merge with `source`, and what is said of it."""
    if kind == "depth":
        return tiny.llama(other, N + 1, 1), "tensor model.layers.2.input_layernorm.weight is only in the second"
    if kind == "tied":
        return tiny.llama(other, N, 1, tied=False), "tensor lm_head.weight is only in the second"
    if kind == "architecture":
        return _edited(source, other, "config.json", model_type="qwen2"), "the architecture is llama and qwen2"
    if kind == "config":
        said = "config.json: rms_norm_eps is 1e-06 and 0.01"
        return _edited(source, other, "config.json", rms_norm_eps=0.01), said
    if kind == "shape":
        made = _rewritten(source, other, lambda n, x: x[:, :-1] if n.endswith("0.mlp.down_proj.weight") else x)
        return made, r"tensor model.layers.0.mlp.down_proj.weight is \[32, 64\] and \[32, 63\]"
    if kind == "dtype":
        return _rewritten(source, other, lambda _, x: x.half()), "tensor .* is F32 and F16"
    if kind == "special token":
        said = "eos_token of tokenizer_config.json is not the same"
        return _edited(source, other, "tokenizer_config.json", eos_token="<|endoftext|>"), said
    if kind == "template":
        shutil.copytree(source, other)
        (other / "chat_template.jinja").write_text("{{ messages }}")
        return other, "chat_template.jinja is not the same"
    if kind == "vocabulary":
        words = json.loads((source / "tokenizer.json").read_text())["model"]
        swapped = words | {"vocab": {k: 255 - v if v < 256 else v for k, v in words["vocab"].items()}}
        return _edited(source, other, "tokenizer.json", model=swapped), "tokenizer.json is not the same"
    made = _edited(source, other, "config.json", quantization_config={"quant_method": "bitsandbytes"})
    return made, "is quantised, so its numbers cannot be merged"


@pytest.mark.parametrize(
    "kind",
    "depth tied architecture config shape dtype special-token template vocabulary quantised".split(),
)
def test_unlike_models_are_refused_by_name(parts: dict[str, Path], tmp_path: Path, kind: str) -> None:
    other, said = _unlike(kind.replace("-", " "), parts["one"], tmp_path / "other")
    with pytest.raises(Refusal, match=said):
        merge.run({"one": parts["one"], "another": other}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_cuts_are_refused_and_spelled(parts: dict[str, Path], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, source, kept in zip(folders, parts.values(), ((0, 5), (0, 1)), strict=True):
        shutil.copytree(source, folder)
        (folder / "hfsd.json").write_text(dumps(Provenance(ModelRef("m"), 6, kept, [])))
    with pytest.raises(Refusal, match=r"a and b do not merge: the blocks kept are \{0, 5\} of 6 and \[0, 2\) of 6"):
        merge.run(dict(zip("ab", folders, strict=True)), tmp_path / "out")
    (folders[1] / "hfsd.json").unlink()
    with pytest.raises(Refusal, match=r"\{0, 5\} of 6 and not said \(no hfsd.json; copy that of the cut"):
        merge.run(dict(zip("ab", folders, strict=True)), tmp_path / "out")
    shutil.copy2(folders[0] / "hfsd.json", folders[1])
    merge.run(dict(zip("ab", folders, strict=True)), tmp_path / "out")
    assert (tmp_path / "out" / "hfsd.json").read_bytes() == (folders[0] / "hfsd.json").read_bytes()


def test_what_saving_writes_differently_is_alike(parts: dict[str, Path], tmp_path: Path) -> None:
    other = _edited(
        parts["one"], tmp_path / "other", "config.json", use_cache=False, transformers_version="5.0.0", dtype="float16"
    )
    content = json.loads((other / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
    (other / "tokenizer.json").write_text(json.dumps(content))
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").unlink()
    config = json.loads((other / "tokenizer_config.json").read_text())
    config |= {"chat_template": template, "eos_token": {"content": config["eos_token"], "lstrip": False}}
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    assert alike.difference(parts["one"], other) is None


def test_numbers_that_are_not_finite_are_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    broken = _rewritten(parts["two"], tmp_path / "broken", lambda n, x: x / 0 if n == "model.norm.weight" else x)
    with pytest.raises(HfsdError, match="slerp makes numbers in model.norm.weight that are not finite"):
        merge.run({"one": parts["one"], "broken": broken}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_mergekit_cannot_do_is_one_line(parts: dict[str, Path], tmp_path: Path) -> None:
    three = {**parts, "three": tiny.llama(tmp_path / "three", N, 3)}
    base = tiny.llama(tmp_path / "base", N, 7)  # all norms are ones, so nothing was learned there
    with pytest.raises(
        HfsdError, match="mergekit's multislerp fails on .*norm.weight: The weighted sum.*; take another"
    ):
        merge.run(three, tmp_path / "out", "multislerp", base=base)
    assert not (tmp_path / "out").exists()


def test_whole_numbers_are_copied_where_they_agree(parts: dict[str, Path], tmp_path: Path) -> None:
    import torch

    def with_positions(count: int) -> Any:
        return lambda name, x: torch.arange(count, count + 32) if name == "model.norm.weight" else x

    folders = [_rewritten(f, tmp_path / str(i), with_positions(i // 2)) for i, f in enumerate([*parts.values()] * 2)]
    merge.run({"a": folders[0], "b": folders[1]}, tmp_path / "out")
    assert _numbers(tmp_path / "out")["model.norm.weight"].equal(torch.arange(32))
    with pytest.raises(Refusal, match="tensor model.norm.weight is stored as I64 and differs; only floating point"):
        merge.run({"a": folders[0], "b": folders[3]}, tmp_path / "no")


@pytest.mark.parametrize("label", ["Mixtral", "Gemma3, multimodal", "GPT-NeoX", "Falcon", "GraniteMoeHybrid", "LFM2"])
def test_architectures_need_no_table(label: str, tmp_path: Path) -> None:
    """Among them some for which mergekit's own command looks for tensors that the files do not have."""
    import torch

    first = architectures.build(next(row for row in architectures.TABLE if row.label == label), tmp_path / "first")
    second = _rewritten(first, tmp_path / "second", lambda _, x: x + torch.ones_like(x) if x.is_floating_point() else x)
    merge.run({"first": first, "second": second}, tmp_path / "out", t=[1.0])
    assert all(_numbers(tmp_path / "out")[name].equal(tensor) for name, tensor in _numbers(second).items())


def test_the_command(parts: dict[str, Path], tmp_path: Path) -> None:
    rows, out = tiny.data_file(tmp_path / "rows.jsonl", 8), tmp_path / "out"
    words = ["merge", *map(str, parts.values()), "--out", str(out), "--t", "0.2,0.8", "--t", "1", "--rows", "3"]
    result = CliRunner().invoke(app, [*words, "--data", str(rows), "--json"])
    assert result.exit_code == 0, result.output
    *_, sentence, closing = result.stdout.splitlines()
    report = json.loads(closing)["report"]
    assert [m["t"] for m in report["losses"]] == [0.2, 0.8, 1.0]
    assert report["t"] == min(report["losses"], key=lambda m: m["loss"])["t"]
    assert sentence.startswith("merged ") and f"by slerp, t {report['t']:g}; held-out loss" in sentence
    assert "SLERP fell back to linear on" in sentence and sentence.endswith(f"in {out}")
    assert models.load(out).config.num_hidden_layers == N
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2 and "is there already" in again.stderr
    for more, message in (
        (["--t", "half"], "hfsd: --t half: give numbers, such as 0.5 or 0.3,0.5,0.7"),
        (["--parameter", "density"], "hfsd: --parameter density: write it as NAME=VALUE, such as density=0.5"),
        (["--base", "b"], "hfsd: --method slerp takes no base; leave --base out"),
        (["--method", "tie"], "hfsd: --method tie: no such method (did you mean 'ties'?)"),
    ):
        failed = CliRunner().invoke(app, ["merge", *map(str, parts.values()), "--out", str(tmp_path / "no"), *more])
        assert failed.exit_code == 2 and failed.stderr.startswith(message) and failed.stderr.count("\n") == 1
    twice = CliRunner().invoke(app, ["merge", "m", "m", "--out", str(tmp_path / "no")])
    assert twice.exit_code == 2 and "m is given twice" in twice.stderr and not (tmp_path / "no").exists()
