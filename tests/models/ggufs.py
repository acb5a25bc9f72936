"""GGUF files for tests, written by package `gguf` as llama.cpp's converter writes them."""

import gguf
import numpy as np

LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA = LAYER | {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
PIECES += ["\u2581", "a", "b", "n", "an", "ana", "ban", "nan", "\u2581a", "\u2581ban", "ü", "  "]
TYPES = [2, 3, 3] + [6] * 256 + [1] * 11 + [4]
SCORES = [0.0] * 259 + [-10.0, -11.0, -12.0, -13.0, -3.0, -2.0, -1.0, -4.0, -5.0, -6.0, -14.0]
SCORES += [-1000.0]


def permuted(rows, heads):
    """As `LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    size = rows.shape[0] // heads
    split = rows.reshape(heads, 2, size // 2, *rows.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2).reshape(rows.shape))


def write(file, config, arrays, kind="F32", **more):
    """Writes a file of a Hugging Face configuration and its arrays by name.

    Matrices get the quantized type `kind`, vectors float32.
    """
    model = config["model_type"]
    name = {"gemma3_text": "gemma3"}.get(model, model)
    writer = gguf.GGUFWriter(file, name)
    writer.add_context_length(config.get("max_position_embeddings", 64))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if config.get("head_dim"):
        writer.add_key_length(config["head_dim"])
    for key, value in more.items():
        write_value = writer.add_float32 if isinstance(value, float) else writer.add_uint32
        write_value(f"{name}.{key.replace('__', '.')}", value)
    if model != "phi3":
        add_tokenizer(writer)
    for key, array in arrays.items():
        add(writer, model, config, key, np.asarray(array, np.float32), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add(writer, model, config, key, array, kind):
    names = GEMMA if model.startswith("gemma") else LAYER
    stem, _, suffix = key.rpartition(".")
    ours = TOP.get(key)
    if ours is None:
        _, _, layer, part = stem.split(".", 3)
        ours = f"blk.{layer}.{names[part]}.{suffix}"
    if model == "llama" and "q_proj" in key:
        array = permuted(array, config["num_attention_heads"])
    if model == "llama" and "k_proj" in key:
        array = permuted(array, config["num_key_value_heads"])
    if model.startswith("gemma") and ours.endswith("norm.weight"):
        array = array + 1
    if array.ndim > 1:
        kind = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(ours, gguf.quants.quantize(array, kind), raw_dtype=kind)
    else:
        writer.add_tensor(ours, array)


def add_tokenizer(writer):
    writer.add_tokenizer_model("llama")
    writer.add_token_list(PIECES)
    writer.add_token_scores(SCORES)
    writer.add_token_types(TYPES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template("{{ messages[0]['content'] }}")
