"""Checkpoint folders: what they say of themselves, the only `from_pretrained` of transformers, the decoder stack."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfsd import plain, processes
from hfsd.errors import BadRequest, Refusal
from hfsd.records import Provenance
from hfsd.rundir import new_folder

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from transformers.utils.quantization_config import QuantizationConfigMixin

PROVENANCE = "hfsd.json"  # beside a cut checkpoint's weights
DEPTH_FIELDS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def check_folder(folder: Path) -> None:
    """Refuses a folder that is no stock safetensors checkpoint."""
    if not (folder / "config.json").is_file():
        raise BadRequest(f"{folder}: no config.json; give the folder of a transformers checkpoint")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles:
            raise BadRequest(how_to_convert(pickles[0], str(folder)))
        raise BadRequest(f"{folder}: no *.safetensors file")


def how_to_convert(file: str, model: str) -> str:
    """What is said of a pickle checkpoint, with the way out."""
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
        return plain.load(Provenance, folder / PROVENANCE)
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


def device() -> torch.device:
    """The accelerator at hand, else the CPU; of several processes, each one's own."""
    import torch

    found = torch.accelerator.current_accelerator(check_available=True)
    if found is None or processes.count() == 1:
        return found or torch.device("cpu")
    return torch.device(found.type, processes.local_rank())


def free_memory() -> int:
    """Free bytes of the device at hand; of a CPU, those that can be had without swapping."""
    import psutil
    import torch

    target = device()
    return int(torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else psutil.virtual_memory().available)


def loaded_dtype(asked: str) -> str:
    """The type that `load` gives the weights, such as `float32`: what `auto` is on the device at hand."""
    if asked != "auto":
        return asked
    return "float32" if device().type in ("cpu", "mps") else "bfloat16"


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

    target, dtype = device(), loaded_dtype(dtype)
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
    return empty(load_config(folder, trust_remote_code), trust_remote_code, folder)


def empty(
    config: PreTrainedConfig, trust_remote_code: bool = False, named: Path | None = None, dtype: str | None = None
) -> PreTrainedModel:
    """The model of a config without storage (parameters and buffers on the meta device).

    Args:
        dtype: of its weights, such as `float32`; None: the config's own.
        named: what is told where transformers cannot build it; None: the config's own name.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with spoken(named or Path(config.name_or_path or config.model_type)), torch.device("meta"):
        options = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code, **options)


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


def dequantise(gguf: Path, folder: Path) -> None:
    """Writes the model in a *.gguf file as a stock folder in float32."""
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


@contextmanager
def own_distribution(model: PreTrainedModel) -> Iterator[None]:
    """While the block runs, `generate` follows what the model itself says next, and what the caller asks for.

    A checkpoint's generation config may ask for more (Qwen2.5: a repetition penalty), and `generate` fills from it all
    that a caller leaves open, even in a config of the caller's own. Here nothing but its special tokens stands in it.
    """
    from transformers import GenerationConfig

    inner = getattr(model, "get_base_model", lambda: model)()  # of a PEFT model, the one that generates
    held = inner.generation_config
    special = {name: getattr(held, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    inner.generation_config = GenerationConfig(**special)
    try:
        yield
    finally:
        inner.generation_config = held


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
