"""The model that `cpu.py` measures: DeepSeek-V3 in small, random weights, in the public format and in two dtypes.

    python benchmarks/reference_model.py FOLDER [--quick]

writes FOLDER/model-float32 and FOLDER/model-bfloat16. The bfloat16 weights are the float32 ones, rounded.
"""

import argparse
from pathlib import Path

import torch

from abyssal import ModelConfig, Transformer

SEED = 20
DTYPES = ("float32", "bfloat16")


def config(quick: bool = False) -> ModelConfig:
    """177.7M parameters; or, to try the benchmark itself, a few hundred thousand in the same shape."""
    full = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 64,
        "v_head_dim": 64,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "n_routed_experts": 32,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 384,
        "n_group": 1,
        "topk_group": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "num_nextn_predict_layers": 0,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    small = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    }
    return ModelConfig.from_dict(full | small if quick else full)


def write(folder: Path, quick: bool = False) -> None:
    """Saves the model in both dtypes. Every matrix is N(0, 0.02), router included, so that routing spreads."""
    model = Transformer(config(quick)).init_weights(torch.Generator().manual_seed(SEED))
    for dtype in DTYPES:
        model.to(getattr(torch, dtype)).save(folder / f"model-{dtype}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    write(arguments.folder, arguments.quick)
