"""Merge: models of one cut, tuned on different sets, as one stock checkpoint. The arithmetic is mergekit's.

Its methods are called tensor by tensor, on models whose tensors have equal names, shapes and dtypes. So no table of
architectures is needed, the result's files are the first model's but for the numbers in them, and memory holds the
largest tensor once per model and once more; mergekit's own command collects results up to 5 GB before it writes.
"""

from __future__ import annotations

import inspect
import math
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import alike, models, processes, selfcheck, shards
from hfsd.engines import Answered, Transformers
from hfsd.errors import BadRequest, HfsdError, Refusal, nearest
from hfsd.plain import dumps
from hfsd.progress import track
from hfsd.records import MergeLoss, MergeReport
from hfsd.rundir import new_folder, write_atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Beside the weights, as hfsd.json is: how a model was merged has to travel with it, and loaders pass over the file.
REPORT = "hfsd-merge.json"
TRAVELS = re.compile(r"\.(json|txt|model|jinja|py|tiktoken)$")
CHUNK = 1 << 18  # numbers: two chunks stay in the cache
SCORE_TOKENS = 2048  # tokens per batch of held-out answers, padding included
DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Score = Callable[["PreTrainedModel"], float]


def run(
    parts: Mapping[str, Path],
    out: Path,
    method: str = "slerp",
    t: Sequence[float] = (0.5,),
    score: Score | None = None,
    base: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Writes the merged checkpoint to a new folder `out`, checked before it gets its name, with hfsd-merge.json.

    Args:
        parts: name -> folder of a stock checkpoint; what is not weights comes from the first.
        method: mergekit's name of it.
        t: share of the second of two parts, 0 to 1; methods that mergekit calls with weights get 1 - t and t. The one
            of the least score is kept. For more than two parts, and methods without shares, it stays 0.5: equal.
        score: held-out loss of a merged model, lower is better; needed for several `t`.
        base: what the parts were tuned from; only methods that merge differences read it (`takes_base`).
        parameters: further ones of the method, by mergekit's names, such as density.

    Raises:
        BadRequest: mergekit is not installed, or the method cannot take what is asked.
        Refusal: the parts differ in architecture, cut, tensors, config or tokenizer; said by name.
        HfsdError: the merge failed or is not finite; nothing is left behind.
    """
    start = time.perf_counter()
    plan = _planned(parts, method, base if takes_base(method) else None, parameters or {}, trust_remote_code)
    values = _values(plan, t)
    if len(values) > 1 and score is None:
        raise BadRequest("several t are told apart by held-out loss: say on which rows with --data, or give one --t")
    _refuse_unlike(plan, out)
    with new_folder(out) as target:
        losses, best, linear = _best(plan, values, score, target)
        report = MergeReport(
            method=method,
            t=best,
            parts=tuple(parts),
            base=None if plan.base is None else plan.base.resolve().name,
            parameters=dict(plan.parameters),
            losses=losses,
            linear_tensors=linear.shares[0],
            linear_params=linear.shares[1],
            seconds=round(time.perf_counter() - start, 3),
            peak_bytes=processes.peak_bytes(),
            mergekit=version("mergekit"),
        )
        write_atomic(target / REPORT, dumps(report))
    return report


def takes_base(method: str) -> bool:
    """Whether a method merges what was learned beyond a base model, and has to be given that or may be.

    Raises:
        BadRequest: mergekit is not installed, or has no such method.
    """
    spec = _method(method).spec
    return spec.contract.base in ("required", "optional") and not _is_between_two(spec)


def faults(method: str) -> list[str]:
    """What keeps a merge by this method from being made here, in one line; empty if nothing does."""
    try:
        _method(method)
    except BadRequest as error:
        return [str(error).removeprefix("--")]
    return []


def loss_on(answers: Sequence[Answered], tokenizer: PreTrainedTokenizerBase) -> Score:
    """Scores by the loss per token of these answers, each after its conversation; the mean over answers."""

    def loss(model: PreTrainedModel) -> float:
        found = [n for n in Transformers(model, tokenizer, SCORE_TOKENS).nats(answers) if n is not None]
        return sum(found) / len(found)

    return loss


@dataclass(frozen=True)
class _Plan:
    """What is merged, and what mergekit says of the method (`spec`): its parameters, and which inputs it takes."""

    parts: Mapping[str, Path]
    base: Path | None
    spec: Any
    parameters: Mapping[str, Any]
    trust_remote_code: bool

    @property
    def first(self) -> Path:
        return next(iter(self.parts.values()))

    @property
    def folders(self) -> dict[str, Path]:
        return dict(self.parts) | ({} if self.base is None else {f"the base {self.base.resolve().name}": self.base})

    @property
    def origin(self) -> Path | None:
        """What mergekit calls the base."""
        return self.first if _is_between_two(self.spec) else self.base

    def takes(self, parameter: str) -> bool:
        return any(p.name == parameter for p in self.spec.parameters)

    def settings(self, t: float | None) -> dict[str, Any]:
        """The method's parameters; its weights are those of the parts, in their order."""
        weights = [1 / len(self.parts)] * len(self.parts) if t is None else [1 - t, t]
        given = dict(self.parameters) | ({"t": t} if self.takes("t") else {})
        return given | ({"weight": weights} if self.takes("weight") else {})


def _method(name: str) -> Any:
    """A method of mergekit."""
    try:
        from mergekit.merge_methods import registry
    except ImportError:
        raise BadRequest("merging needs mergekit: pip install 'hfsd[merge]'") from None
    known = {m.spec.name: m for m in registry.registered_methods()}
    if name not in known:
        raise BadRequest(f"--method {name}: no such method{nearest(name, known)}; there are {', '.join(sorted(known))}")
    return known[name]


def _is_between_two(spec: Any) -> bool:
    """Of methods that go from one model to another, the first one is what mergekit calls the base."""
    return bool(spec.contract.base == "required" and spec.contract.max_inputs == 2)


def _planned(
    parts: Mapping[str, Path], name: str, base: Path | None, parameters: Mapping[str, Any], trust_remote_code: bool
) -> _Plan:
    """Refuses what the method cannot take, by what mergekit says of it."""
    if len(parts) < 2:
        raise BadRequest(f"merging takes two or more models, and {' '.join(parts) or 'none'} was given")
    method = _method(name)
    plan = _Plan(parts, base, method.spec, _checked(method.spec, parameters), trust_remote_code)
    if plan.origin is None and method.spec.contract.base == "required":
        raise BadRequest(f"--method {name} merges what was learned: say what all were tuned from with --base MODEL")
    folders = [folder.resolve() for folder in plan.folders.values()]
    if twice := next((f for f in folders if folders.count(f) > 1), None):
        raise BadRequest(f"{twice} is given twice; a model merged with itself is that model")
    try:
        method.validate_inputs(folders, None if plan.origin is None else plan.origin.resolve())
    except ValueError as error:
        raise BadRequest(f"--method {name} with {len(parts)} models: {error}; give as many as it takes") from None
    return plan


def _checked(spec: Any, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Further parameters as values of the types that mergekit wants."""
    known = {p.name: p for p in spec.parameters if p.name not in ("t", "weight")}
    checked = {}
    for name, value in parameters.items():
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise BadRequest(
                f"--parameter {name}: {spec.name} has no such parameter{nearest(name, known)}; {takes} beside --t"
            )
        try:
            checked[name] = known[name].validate(value)
        except ValueError:
            kind = getattr(known[name].value_type, "__name__", known[name].value_type)
            raise BadRequest(f"--parameter {name}={value}: {spec.name} takes a {kind} there") from None
    return checked


def _values(plan: _Plan, t: Sequence[float]) -> list[float | None]:
    """What to try; None for methods and numbers of models that know equal shares only."""
    said = ", ".join(f"{v:g}" for v in t)
    if not t or not all(0 <= v <= 1 for v in t) or len(set(t)) < len(t):
        raise BadRequest(f"--t {said}: give different numbers from 0 to 1")
    if plan.takes("t") or (plan.takes("weight") and len(plan.parts) == 2):
        return list(t)
    if list(t) != [0.5]:
        raise BadRequest(
            f"--t {said}: {plan.spec.name} of {len(plan.parts)} models knows equal shares only; leave it out"
        )
    return [None]


def _best(
    plan: _Plan, values: Sequence[float | None], score: Score | None, target: Path
) -> tuple[list[MergeLoss], float | None, _Linear]:
    """Writes the merge of least loss into `target`; no more than two are ever on the disk."""
    losses: list[MergeLoss] = []
    best, tried = target / "best", target / "tried"
    kept, linear = values[0], _Linear()
    for number, t in enumerate(values):
        tried.mkdir()
        _write(plan, t, tried, linear if number == 0 and plan.spec.name == "slerp" else None)
        selfcheck.structure(tried, plan.trust_remote_code)
        before = min((m.loss for m in losses), default=math.inf)
        if score is not None:
            losses.append(MergeLoss(t, _scored(score, tried, t, plan.trust_remote_code)))
        if losses and losses[-1].loss >= before:
            shutil.rmtree(tried)
            continue
        shutil.rmtree(best, ignore_errors=True)  # not there at first
        os.replace(tried, best)
        kept = t
    for path in best.iterdir():
        os.replace(path, target / path.name)
    best.rmdir()
    return losses, kept, linear


def _scored(score: Score, folder: Path, t: float | None, trust_remote_code: bool) -> float:
    loss = float(score(models.load(folder, trust_remote_code=trust_remote_code)))
    if not math.isfinite(loss):
        raise HfsdError(f"the loss of the merge at t {t} is {loss}; look at the rows it is measured on, or leave t out")
    return loss


def _write(plan: _Plan, t: float | None, out: Path, linear: _Linear | None) -> None:
    """One merged checkpoint in the layout of the first part: its files, with other numbers in its tensors' places."""
    import torch

    for path in sorted(plan.first.iterdir()):
        # Of indices, the safetensors' own: another format's weights do not travel.
        stray = path.name.endswith(".index.json") and path.name != shards.INDEX
        if path.is_file() and TRAVELS.search(path.name) and not stray:
            shutil.copy2(path, out / path.name)
    places = shards.read(plan.first)
    sources = [{tensor.name: tensor for tensor in shards.read(folder)} for folder in plan.folders.values()]
    # One buffer per model for all of its tensors: new pages would cost more than reading into old ones.
    buffers = [torch.empty(max(p.bytes for p in places), dtype=torch.uint8) for _ in sources]
    with (
        ExitStack() as stack,
        torch.random.fork_rng(devices=[]),
        track("merge", len(places), "tensors") as advance,
    ):
        files = {f: stack.enter_context(_like(f, out / f.name)) for f in dict.fromkeys(p.file for p in places)}
        torch.manual_seed(0)  # for methods that drop numbers at random
        for place in places:
            tensors = [_read(source[place.name], buffer) for source, buffer in zip(sources, buffers, strict=True)]
            merged = _merged(plan, t, place, tensors)
            files[place.file].seek(place.start)
            files[place.file].write(memoryview(merged.contiguous().reshape(-1).view(torch.uint8).numpy()))
            if linear is not None and place.dtype in DTYPES:
                linear.add(tensors[0], tensors[1])
            advance()


@contextmanager
def _like(source: Path, target: Path) -> Iterator[Any]:
    """A new safetensors file of the same header and size, open for writing the data."""
    with open(source, "rb") as old, open(target, "wb") as new:
        length = old.read(8)
        new.write(length + old.read(int.from_bytes(length, "little")))
        new.truncate(source.stat().st_size)
        yield new


def _read(tensor: shards.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """A tensor from its file into a buffer; of a storage that is not merged, its bytes."""
    import torch

    data = buffer[: tensor.bytes]
    with open(tensor.file, "rb") as file:
        file.seek(tensor.start)
        if file.readinto(memoryview(data.numpy())) != tensor.bytes:
            raise HfsdError(f"{tensor.file} ended early; fetch the checkpoint again")
    return data.view(getattr(torch, DTYPES[tensor.dtype])).reshape(tensor.shape) if tensor.dtype in DTYPES else data


def _merged(plan: _Plan, t: float | None, place: shards.Tensor, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The tensor that the method makes, of the parts' dtype. Whole numbers (positions, masks) are the same in all."""
    import torch
    from mergekit.merge_methods import merge_tensors

    if place.dtype not in DTYPES:
        if not all(tensor.equal(tensors[0]) for tensor in tensors):
            raise Refusal(f"tensor {place.name} is stored as {place.dtype} and differs; only floating point is merged")
        return tensors[0]
    folders = list(plan.folders.values())
    base = None if plan.origin is None else folders.index(plan.origin)
    name = plan.spec.name
    try:
        merged = merge_tensors(
            tensors, name, parameters=plan.settings(t), base_index=base, name=place.name, out_dtype=tensors[0].dtype
        )
    except (RuntimeError, ValueError, TypeError) as error:
        words = " ".join(str(error).split())[:300]
        raise HfsdError(f"mergekit's {name} fails on {place.name}: {words}; take another --method") from error
    exact = torch.float64 if merged.dtype == torch.float64 else torch.float32
    if not math.isfinite(merged.sum(dtype=exact)):
        raise HfsdError(f"{name} makes numbers in {place.name} that are not finite; take another --method")
    return merged


class _Linear:
    """Counts what mergekit's SLERP interpolates linearly, at any t.

    Its test: |cos| of the two tensors, each as one vector, over `dot_threshold`; a norm of at most `eps` counts as 1.
    A stock checkpoint holds tied tensors once.
    """

    def __init__(self) -> None:
        self.tensors = self.params = self.linear_tensors = self.linear_params = 0

    def add(self, first: torch.Tensor, second: torch.Tensor) -> None:
        from mergekit.merge_methods.slerp import slerp

        defaults = {name: p.default for name, p in inspect.signature(slerp).parameters.items()}
        is_linear = abs(_cosine(first, second, defaults["eps"])) > defaults["dot_threshold"]
        self.tensors, self.params = self.tensors + 1, self.params + first.numel()
        self.linear_tensors += is_linear
        self.linear_params += is_linear * first.numel()

    @property
    def shares(self) -> tuple[float | None, float | None]:
        """Of tensors and of parameters; None where nothing was counted."""
        if not self.tensors:
            return None, None
        return self.linear_tensors / self.tensors, self.linear_params / self.params


def _cosine(first: torch.Tensor, second: torch.Tensor, eps: float) -> float:
    import torch

    aa = bb = ab = 0.0
    exact = torch.float64 if first.dtype == torch.float64 else torch.float32
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on chunks this small, several wait for one another longer than they work
    try:
        for a, b in zip(first.reshape(-1).split(CHUNK), second.reshape(-1).split(CHUNK), strict=True):
            x, y = a.to(exact), b.to(exact)
            aa, bb, ab = aa + float(x @ x), bb + float(y @ y), ab + float(x @ y)
    finally:
        torch.set_num_threads(threads)
    norms = [math.sqrt(s) if math.sqrt(s) > eps else 1.0 for s in (aa, bb)]
    return ab / (norms[0] * norms[1])


def _refuse_unlike(plan: _Plan, out: Path) -> None:
    """Every model against the first one."""
    for folder in plan.folders.values():
        models.check_folder(folder)
        if out.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise BadRequest(f"{out} holds {folder}, which is merged; give another --out")
        if "quantization_config" in models.text_config(models.config_dict(folder)) | models.config_dict(folder):
            raise Refusal(f"{folder} is quantised, so its numbers cannot be merged; merge first, then quantise")
    (name, first), *others = plan.folders.items()
    for other, folder in others:
        if what := alike.difference(first, folder, plan.trust_remote_code):
            raise Refusal(f"{name} and {other} do not merge: {what}; merge models tuned from one checkpoint")
