"""Prefill and decode speed of models in turns, and the peak memory of a process that holds one model alone.

`python -m hfsd.speed JSON` is that process: it does one turn and prints its peak memory in bytes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from hfsd import models, processes
from hfsd.findings import Estimate

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PROMPT, NEW, TURNS = 128, 16, 3  # tokens read, tokens made, rounds
HOW = (
    f"{PROMPT} tokens read and {NEW} made, batch 1, {TURNS} turns side by side: the median, the least and the greatest"
)
FIRST_ID = 10  # token ids below it are often special


@dataclass(frozen=True)
class Speed:
    """Tokens per second at batch 1: the median of the turns, the least and the greatest as bounds."""

    prefill: Estimate
    decode: Estimate


@dataclass(frozen=True)
class Alone:
    """What the process that holds one model is told: which one, and how it is loaded and run."""

    folder: str
    dtype: str
    trust_remote_code: bool
    device_map: str | dict[str, str | int] | None
    threads: int


def side_by_side(held: Mapping[str, PreTrainedModel]) -> dict[str, Speed]:
    """The speed of models in memory, each in its turn, round by round, after one prefill that is not counted."""
    for model in held.values():
        _seconds(model, _prompt(model), 1)
    rounds = [{name: turn(model) for name, model in held.items()} for _ in range(TURNS)]
    return {name: Speed(*(_estimate([r[name][i] for r in rounds]) for i in (0, 1))) for name in held}


def turn(model: PreTrainedModel) -> tuple[float, float]:
    """Tokens per second of reading `PROMPT` tokens (the first new one included), and of `NEW` more greedy ones.

    By transformers' own `generate`, so with whatever cache the model has; what making one token takes is subtracted.
    """
    ids = _prompt(model)
    first, all_of_them = _seconds(model, ids, 1), _seconds(model, ids, 1 + NEW)
    return PROMPT / first, NEW / (all_of_them - first)


def _prompt(model: PreTrainedModel) -> torch.Tensor:
    """Tokens of any meaning, which costs nothing, [1, P]."""
    import torch

    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return ((FIRST_ID + torch.arange(PROMPT)) % vocabulary)[None].to(model.device)


def _seconds(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int) -> float:
    import torch

    end = model.generation_config.eos_token_id
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}
    options |= {"pad_token_id": end[0] if isinstance(end, list) else end}
    start = time.perf_counter()
    with torch.inference_mode():
        made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    made[0, -1].item()  # waits for the device
    return time.perf_counter() - start


def setting(model: PreTrainedModel) -> str:
    """On what it was measured, such as `cpu, 2 threads, float32`."""
    import torch

    device = model.device.type
    name = torch.cuda.get_device_name(model.device) if device == "cuda" else device
    count = torch.get_num_threads()
    threads = f", {count} thread{'s' if count > 1 else ''}" if device == "cpu" else ""
    return f"{name}{threads}, {str(model.dtype).removeprefix('torch.')}"


def peak_alone(asked: Alone) -> tuple[int | None, str]:
    """Peak memory of a new process that loads a model and does one turn, and the way it was measured.

    None where that process fails, which it does where memory is short; the second part says how then.
    """
    command = [sys.executable, "-m", "hfsd.speed", json.dumps(asdict(asked))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return int(done.stdout.split()[-1]), "peak: a process of its own"
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    return None, f"no peak: the process ended with code {done.returncode} and said {last[:200]}"


def main(argument: str) -> None:
    """The process of `peak_alone`."""
    import torch

    asked = Alone(**json.loads(argument))
    torch.set_num_threads(asked.threads)
    model = models.load(Path(asked.folder), asked.dtype, asked.trust_remote_code, asked.device_map)
    turn(model)
    print(processes.peak_bytes())


def _estimate(values: list[float]) -> Estimate:
    return Estimate(median(values), min(values), max(values))


if __name__ == "__main__":
    main(sys.argv[1])
