"""A public-format DeepSeek-V3 folder as a GGUF file of llama.cpp's architecture `deepseek2`.

    python benchmarks/gguf_export.py FOLDER FILE.gguf

Needs numpy and gguf and nothing else, so it runs where llama.cpp is installed. The weights keep their dtype, but for
the routers and norms, which llama.cpp wants in float32. There is no tokenizer: ids go in and logits come out.
llama.cpp attends absorbed, as one key-value head whose key is the latent and the rotary key, so `kv_b_proj` is split
into W_UK, transposed, and W_UV.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

_MLP = {"gate_proj": "ffn_gate", "down_proj": "ffn_down", "up_proj": "ffn_up"}

_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    **{f"mlp.{public}.weight": f"{theirs}.weight" for public, theirs in _MLP.items()},
    **{f"mlp.shared_experts.{public}.weight": f"{theirs}_shexp.weight" for public, theirs in _MLP.items()},
}

_TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}

_WIDE = ("norm.weight", "ffn_gate_inp.weight", ".bias")


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of the folder, mapped; bfloat16, which numpy lacks, as its bits in uint16."""
    dtypes = {"F32": np.float32, "BF16": np.uint16}
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(file, np.uint8, "r")
        size = int(raw[:8].view(np.uint64)[0])
        for name, entry in json.loads(raw[8 : 8 + size].tobytes()).items():
            if name != "__metadata__":
                start, end = (8 + size + offset for offset in entry["data_offsets"])
                tensors[name] = raw[start:end].view(dtypes[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def renamed(tensors: dict[str, np.ndarray], config: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """llama.cpp's names and shapes: experts stacked, `kv_b_proj` split."""
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for name, tensor in tensors.items():
        if name in _TOP:
            yield _TOP[name], tensor
            continue
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        if not found:
            raise ValueError(f"{name}: has no place in a GGUF file of deepseek2")
        block, rest = f"blk.{found[1]}", found[2]
        if rest == "self_attn.kv_b_proj.weight":
            by_head = tensor.reshape(heads, -1, tensor.shape[-1])
            yield f"{block}.attn_k_b.weight", by_head[:, :nope].transpose(0, 2, 1)
            yield f"{block}.attn_v_b.weight", by_head[:, nope:]
        elif expert := re.fullmatch(r"mlp\.experts\.0\.(\w+)\.weight", rest):
            stem = f"model.layers.{found[1]}.mlp.experts"
            stack = [tensors[f"{stem}.{e}.{expert[1]}.weight"] for e in range(config["n_routed_experts"])]
            yield f"{block}.{_MLP[expert[1]]}_exps.weight", np.stack(stack)
        elif not rest.startswith("mlp.experts."):
            yield f"{block}.{_LAYER[rest]}", tensor


def export(folder: Path, file: Path) -> None:
    """Writes the GGUF file. Raises KeyError or ValueError for a tensor that the architecture has no place for."""
    config = json.loads((folder / "config.json").read_text())
    if config.get("rope_scaling") or config["n_group"] > 1:
        raise ValueError("rope_scaling and expert groups are not exported")
    tensors = read_safetensors(folder)
    narrow = any(tensor.dtype == np.uint16 for tensor in tensors.values())
    writer = gguf.GGUFWriter(str(file), "deepseek2")
    nope, rope, rank = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["kv_lora_rank"]
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if narrow else gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    for name, tensor in renamed(tensors, config):
        if tensor.dtype == np.uint16 and name.endswith(_WIDE):
            tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
        if tensor.dtype == np.uint16:
            tensor = np.ascontiguousarray(tensor).view(np.uint8)  # the writer takes other types as bytes
            writer.add_tensor(name, tensor, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    export(Path(sys.argv[1]), Path(sys.argv[2]))
