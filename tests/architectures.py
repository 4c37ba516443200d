"""Tiny random models of every architecture in the README's table, built from their configs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

N_LAYERS = 6
BASE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = ["sliding_attention", "full_attention"] * (N_LAYERS // 2)
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
}
ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 128}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": N_LAYERS,  # as deep as the decoder: the two stacks must not be confused
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@dataclass(frozen=True)
class Architecture:
    """A row of the table: `config` are fields over BASE; `refused` is the reason, where no cut of it is sound."""

    label: str
    kind: str  # transformers' config class, less `Config`
    config: dict[str, Any]
    refused: str | None = None
    plain: bool = False  # BASE does not apply


def _row(label: str, kind: str, refused: str | None = None, plain: bool = False, **config: Any) -> Architecture:
    return Architecture(label, kind, config, refused, plain)


TABLE = (
    _row("Llama, tied", "Llama", tie_word_embeddings=True),
    _row("Llama, untied", "Llama", tie_word_embeddings=False),
    _row("Llama, rope scaling", "Llama", rope_parameters={**ROPE, "original_max_position_embeddings": 32}),
    _row("Mistral, sliding window", "Mistral", sliding_window=8),
    _row("Mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2),
    _row("Qwen2", "Qwen2"),
    _row("Qwen2, sliding layers", "Qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=3),
    _row("Qwen3", "Qwen3", head_dim=8),
    _row("Qwen3-MoE, mlp_only_layers", "Qwen3Moe", head_dim=8, num_experts=4, mlp_only_layers=[1, 4], **EXPERTS),
    _row(
        "Qwen3-Next",
        "Qwen3Next",
        head_dim=8,
        num_experts=4,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "linear_attention", "full_attention"] * 2,
        **EXPERTS,
        **LINEAR,
    ),
    _row("Gemma2", "Gemma2", head_dim=8, sliding_window=8),
    _row("Gemma3, text", "Gemma3Text", head_dim=8, sliding_window=8, layer_types=SLIDING),
    _row(
        "Gemma3, multimodal",
        "Gemma3",
        plain=True,
        text_config={**BASE, "head_dim": 8, "sliding_window": 8, "layer_types": SLIDING},
        vision_config=VISION,
        mm_tokens_per_image=4,
        image_token_index=60,
        boi_token_index=61,
        eoi_token_index=62,
    ),
    _row("Phi3", "Phi3"),
    _row("OLMo2", "Olmo2"),
    _row("OLMo3", "Olmo3", sliding_window=8, layer_types=SLIDING),
    _row("SmolLM3, no_rope_layers", "SmolLM3", no_rope_layers=[1, 1, 0, 1, 1, 0]),
    _row("gpt-oss", "GptOss", head_dim=8, num_local_experts=4, sliding_window=8, num_experts_per_tok=2),
    _row(
        "DeepSeek-V3, first_k_dense_replace",
        "DeepseekV3",
        first_k_dense_replace=2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_key_value_heads=4,
        **{**LATENT, **EXPERTS},
    ),
    _row("Granite", "Granite", residual_multiplier=0.5),
    _row(
        "GraniteMoeHybrid",
        "GraniteMoeHybrid",
        layer_types=["mamba", "mamba", "attention"] * 2,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=16,
        **MAMBA,
    ),
    _row("LFM2", "Lfm2", layer_types=["conv", "conv", "full_attention"] * 2, block_ff_dim=48),
    _row(
        "Llama4, text",
        "Llama4Text",
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=1,
        intermediate_size_mlp=48,
        interleave_moe_layer_step=2,
        attention_chunk_size=16,
    ),
    _row("GPT-2", "GPT2", plain=True, **GPT2),
    _row(
        "GPT-2, attention scaled by block index",
        "GPT2",
        refused="scale_attn_by_inverse_layer_idx",
        plain=True,
        scale_attn_by_inverse_layer_idx=True,
        **GPT2,
    ),
    _row("GPT-NeoX", "GPTNeoX"),
    _row("OPT", "OPT", ffn_dim=48, word_embed_proj_dim=32),
    _row("Falcon", "Falcon", new_decoder_architecture=True, num_kv_heads=2),
    _row("StableLM", "StableLm"),
    _row("Cohere2", "Cohere2", sliding_window=8, head_dim=8),
)


def build(row: Architecture, folder: Path) -> Path:
    """The random model of a row, saved to a folder as any checkpoint is."""
    import transformers

    config = getattr(transformers, f"{row.kind}Config")(**({} if row.plain else BASE) | row.config)
    return save(transformers.AutoModelForCausalLM.from_config(config), folder)


def save(model: Any, folder: Path) -> Path:
    """A model with random weights, in float32."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.float().named_parameters():
            if parameter.dim() > 1 and "conv" not in name:
                parameter.normal_(std=0.2)  # the default start is so small that every block is nearly the identity
    model.save_pretrained(folder)
    return folder


FP8 = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head", "model.layers.1.mlp", "model.layers.4.mlp"],
}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}


def quantised(folder: Path, scheme: dict[str, Any]) -> Path:
    """A Llama whose matrices are stored in 8 bits, as the two common schemes lay them out."""
    from safetensors.torch import load_file, save_file

    wide = {"hidden_size": 128, "intermediate_size": 256, "num_key_value_heads": 4, "tie_word_embeddings": False}
    build(_row("", "Llama", **wide), folder)
    tensors: dict[str, Any] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        left_alone = any(part in name for part in scheme.get("modules_to_not_convert", []))
        if "proj" in name and not left_alone:
            tensors |= _fp8(name, tensor) if scheme is FP8 else _int8(name, tensor)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))
    return folder


def _fp8(name: str, weight: Any) -> dict[str, Any]:
    import torch

    tiles = weight.reshape(weight.shape[0] // 128, 128, -1, 128)
    scale = tiles.abs().amax((1, 3)) / 448  # the largest number of the format
    stored = (tiles / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn)
    return {name: stored, f"{name}_scale_inv": scale}


def _int8(name: str, weight: Any) -> dict[str, Any]:
    import torch

    scale = weight.abs().amax(1, keepdim=True) / 127
    return {name: (weight / scale).round().to(torch.int8), f"{name}_scale": scale}


REMOTE_CONFIG = """
import os
from transformers import PretrainedConfig
os.environ["WAVE_RAN"] = "yes"
class WaveConfig(PretrainedConfig):
    model_type = "wave"
    def __init__(self, vocab_size=64, hidden_size=32, num_hidden_layers=6, by_index=False, **kw):
        self.vocab_size, self.hidden_size, self.by_index = vocab_size, hidden_size, by_index
        self.num_hidden_layers = num_hidden_layers
        super().__init__(**kw)
"""
REMOTE_MODEL = """
import torch
from torch import nn
from transformers import PreTrainedModel, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from .configuration_wave import WaveConfig
class Ripple(nn.Module):
    def __init__(self, config, index):
        super().__init__()
        self.mix = nn.Linear(config.hidden_size, config.hidden_size)
        self.power = 1.0 + index if config.by_index else 1.0
    def forward(self, hidden_states):
        running = hidden_states.cumsum(1) / torch.arange(1, hidden_states.shape[1] + 1)[None, :, None]
        return hidden_states + self.power * torch.tanh(self.mix(running))
class WaveForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = WaveConfig
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.ripples = nn.ModuleList(Ripple(config, i) for i in range(config.num_hidden_layers))
        self.out = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
    def forward(self, input_ids, attention_mask=None, use_cache=None, **kw):
        h = self.wte(input_ids)
        for ripple in self.ripples:
            h = ripple(h)
        return CausalLMOutputWithPast(logits=self.out(h))
    def prepare_inputs_for_generation(self, input_ids, **kw):
        return {"input_ids": input_ids}
"""


def with_code_of_its_own(folder: Path, by_index: bool) -> Path:
    """A model that transformers does not know: its repo brings the classes, which set $WAVE_RAN when they run.

    Args:
        by_index: its blocks compute with their own index, so no cut before the last block is sound.
    """
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    folder.mkdir()
    (folder / "configuration_wave.py").write_text(REMOTE_CONFIG)
    (folder / "modeling_wave.py").write_text(REMOTE_MODEL)
    classes = {"AutoConfig": "configuration_wave.WaveConfig", "AutoModelForCausalLM": "modeling_wave.WaveForCausalLM"}
    config = {"model_type": "wave", "architectures": ["WaveForCausalLM"], "auto_map": classes}
    config |= {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": N_LAYERS, "by_index": by_index}
    (folder / "config.json").write_text(json.dumps(config))
    kind = get_class_from_dynamic_module(classes["AutoModelForCausalLM"], str(folder))
    save(kind(kind.config_class(**config)), folder)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# [start, stop) of the blocks removed. The widths are odd, so that no pattern of every second or third block survives by
# luck.
CUTS = {"first": (0, 1), "middle": (2, 5), "last": (5, 6)}
