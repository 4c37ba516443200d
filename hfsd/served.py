"""lm-eval's own models for variants that do not run in this program: vLLM in this process, or a server.

Imports lm-eval: only an evaluation that asks for these engines imports this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.models.utils import resolve_max_length

from hfsd import endpoint, models
from hfsd.blocks import Endpoint
from hfsd.blocks_cut import Model
from hfsd.errors import BadRequest, HfsdError, Refusal


@dataclass(frozen=True)
class Server:
    """Where a variant is served, under which name, and with which key."""

    asked: Endpoint
    model: str
    key: str


def servers(asked: Mapping[str, Endpoint], names: Mapping[str, str]) -> dict[str, Server]:
    """The servers of variants, each of which lists its model.

    Args:
        asked: the recipe's servers by variant id.
        names: for each variant that is to be evaluated, what it is called where the recipe names no model.

    Raises:
        BadRequest: a key is not set.
        HfsdError: a server is not there.
        Refusal: a server serves other models. One line for each that is wrong; nothing was evaluated.
    """
    found, faults = {}, []
    for variant, name in names.items():
        where, server = f"evaluate.endpoint.{variant}", asked[variant]
        model, key = server.model or name, endpoint.key_for(server, where)
        served, why, _ = endpoint.listed(f"{server.url.rstrip('/')}/models", key, server.timeout, where)
        if served is None:
            raise HfsdError(
                f"{where} {server.url}: lists no models ({why}); start its server, then `hfsd eval` goes on"
            )
        if model not in served:
            faults.append(
                f"{where} {server.url} serves {', '.join(sorted(served)) or 'nothing'}, not {model}; set {where}.model "
                "to the variant's name there, or serve the variant"
            )
        found[variant] = Server(server, model, key)
    if faults:
        raise Refusal("\n".join(faults))
    return found


class Completions(LocalCompletionsAPI):
    """lm-eval's `local-completions` with a key of its own, and texts split into tokens as in this process."""

    def __init__(self, server: Server, folder: Path, trust_remote_code: bool = False) -> None:
        asked, config = server.asked, models.load_config(folder, trust_remote_code)
        super().__init__(
            base_url=f"{asked.url.rstrip('/')}/completions",
            model=server.model,
            tokenizer=str(folder),
            tokenizer_backend="huggingface",
            num_concurrent=asked.concurrency,
            max_retries=asked.retries + 1,
            timeout=max(1, round(asked.timeout)),
            max_length=resolve_max_length(config),  # lm-eval would take 2048
            header={"Authorization": f"Bearer {server.key}"},
            trust_remote_code=trust_remote_code,
        )

    def tok_encode(self, string: Any, left_truncate_len: int | None = None, **options: Any) -> Any:
        """With the tokenizer's own special tokens, unless the text brings them, as lm-eval's `hf` does."""
        if not isinstance(string, str):
            return [self.tok_encode(one, left_truncate_len) for one in string]
        begins = string.startswith(self.tokenizer.decode(self.prefix_token_id))
        ids = self.tokenizer.encode(string, **({"add_special_tokens": False} if begins else {}))
        return ids[-left_truncate_len:] if left_truncate_len else ids


def vllm(folder: Path, model: Model, tensor_parallel: int, seed: int) -> Any:
    """lm-eval's `vllm` on a stock checkpoint, in this process.

    Raises:
        BadRequest: vLLM is not installed here.
    """
    try:
        from lm_eval.models.vllm_causallms import VLLM
    except ImportError as error:
        raise BadRequest(
            f"evaluate.engine: vllm needs vLLM in this environment ({error}); install it, or start `vllm serve` in one "
            "of its own and use evaluate.engine: endpoint"
        ) from None
    return VLLM(
        pretrained=str(folder),
        dtype=model.dtype,
        tensor_parallel_size=tensor_parallel,
        trust_remote_code=model.trust_remote_code,
        seed=seed,
    )
