"""Tiny random causal LMs of many families of transformers, and which of them have blocks that a method can sparsify."""

from __future__ import annotations

import torch
import transformers

# Each field is set where a family's configuration has it.
SMALL = {
    "vocab_size": 320, "hidden_size": 64, "n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "intermediate_size": 160,
    "ffn_dim": 160, "num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "num_attention_heads": 4, "n_head": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    "max_position_embeddings": 128, "n_positions": 128, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "moe_intermediate_size": 32, "num_experts_per_tok": 2,
}  # fmt: skip
KNOWN = (
    "biogpt", "bitnet", "cohere", "cohere2", "cwm", "diffllama", "ernie4_5", "exaone", "exaone4", "flint", "gemma", "gemma2",
    "gemma3_text", "gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "granite", "granite_swa", "helium",
    "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "llama", "ministral", "ministral3", "mistral", "olmo",
    "olmo2", "olmo3", "openai-gpt", "opt", "phi3", "qwen2", "qwen3", "seed_oss", "smollm3", "stablelm", "vaultgemma", "xglm",
)  # fmt: skip
UNKNOWN = (
    "afmoe", "apertus", "arcee", "bloom", "codegen", "ctrl", "deepseek_v2", "doge", "glm", "glm4", "gpt_oss", "gptj",
    "jais2", "lfm2", "mixtral", "mpt", "nanochat", "nemotron", "olmoe", "persimmon", "phi", "qwen3_moe", "starcoder2",
)  # fmt: skip


def family(kind: str, scale: float = 3.0, seed: int = 0, **changes):
    """A small random model of a family, float32, eval mode, frozen.

    scale: of the weights against the default initialisation, so that channels differ; norms get weights of 0.5 to 1.5,
    so that folding them or leaving them out matters.
    """
    cls = type(transformers.AutoConfig.for_model(kind))
    known = cls()
    fields = {k: v for k, v in SMALL.items() if hasattr(known, k)}
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(cls(**{**fields, **changes}), dtype=torch.float32)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
            elif "norm" in name and name.endswith("weight"):
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return model.eval().requires_grad_(False)
