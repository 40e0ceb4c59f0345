"""First inputs of the `gguf` target: a whole model of each architecture in a few kilobytes, so that an execution takes microseconds.

From the folder of the crate, with the `gguf` package: python3 fuzz/seeds.py fuzz/corpus/gguf
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType as Form
from gguf import ExpertGatingFuncType, GGUFWriter, TokenType
from gguf.quants import quantize

OUT = Path(sys.argv[1])
HIDDEN, WIDTH, WORDS, EXPERTS, RANK, NOPE, ROPE = 4, 4, 8, 2, 4, 2, 2
VOCABULARY = ["<s>", "</s>", "a", "b", "Ġ", "ab", "1", "2"]
RNG = np.random.default_rng(1)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def block(hidden, width, experts, qk_norm=False, bias=False):
    """Tensors of one layer."""
    attention = {f"attn_{part}.weight": random(hidden, hidden) for part in ["q", "k", "v", "output"]}
    norms = {f"{part}_norm.weight": random(hidden) for part in ["attn", "ffn"] + ["attn_q", "attn_k"] * qk_norm}
    biases = {f"attn_{part}.bias": random(hidden) for part in ["q", "k", "v"] * bias}
    shapes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    if experts:
        feed = {f"ffn_{part}_exps.weight": random(experts, *shape) for part, shape in shapes.items()}
        feed["ffn_gate_inp.weight"] = random(experts, hidden)
    else:
        feed = {f"ffn_{part}.weight": random(*shape) for part, shape in shapes.items()}
    return norms | attention | biases | feed


def shared(width, gate):
    more = {
        "ffn_gate_shexp.weight": random(width, HIDDEN), "ffn_up_shexp.weight": random(width, HIDDEN),
        "ffn_down_shexp.weight": random(HIDDEN, width),
    }
    return more | ({"ffn_gate_inp_shexp.weight": random(HIDDEN)} if gate else {})


def write(name, arch, layer, more=lambda writer: None, hidden=HIDDEN, width=WIDTH, kv_heads=1, pre="gpt-2"):
    writer = GGUFWriter(None, arch)
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(width)
    writer.add_head_count(1)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(WORDS)
    more(writer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (WORDS - 2))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    tensors = {"token_embd.weight": random(WORDS, hidden), "output_norm.weight": random(hidden)}
    tensors |= {"output.weight": random(WORDS, hidden)}
    for key, tensor in (tensors | {f"blk.0.{key}": tensor for key, tensor in layer.items()}).items():
        if isinstance(tensor, tuple):
            writer.add_tensor(key, tensor[1], raw_dtype=tensor[0])
        else:
            writer.add_tensor(key, tensor)
    OUT.mkdir(parents=True, exist_ok=True)
    writer.write_header_to_file(OUT / f"{name}.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def experts(writer):
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(1)


def own_width(writer):
    experts(writer)
    writer.add_expert_feed_forward_length(WIDTH)


def head(writer, size=HIDDEN):
    writer.add_key_length(size)
    writer.add_value_length(size)


def qwen2moe(writer):
    own_width(writer)
    writer.add_expert_shared_feed_forward_length(WIDTH)


def qwen3moe(writer):
    own_width(writer)
    head(writer)


def gpt_oss(writer):
    qwen3moe(writer)
    writer.add_sliding_window(4)
    writer.add_string("gpt-oss.rope.scaling.type", "yarn")
    writer.add_rope_scaling_factor(32.0)
    writer.add_rope_scaling_orig_ctx_len(8)


def deepseek2(writer):
    own_width(writer)
    writer.add_leading_dense_block_count(0)
    writer.add_expert_shared_count(1)
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_rope_dimension_count(ROPE)
    writer.add_kv_lora_rank(RANK)
    writer.add_key_length(RANK + ROPE)
    writer.add_value_length(RANK)
    writer.add_key_length_mla(NOPE + ROPE)
    writer.add_value_length_mla(NOPE)


def latent():
    layer = {key: tensor for key, tensor in block(HIDDEN, WIDTH, EXPERTS).items() if "attn_" not in key}
    return layer | shared(WIDTH, False) | {
        "attn_norm.weight": random(HIDDEN), "attn_q.weight": random(NOPE + ROPE, HIDDEN),
        "attn_kv_a_mqa.weight": random(RANK + ROPE, HIDDEN), "attn_kv_a_norm.weight": random(RANK),
        "attn_k_b.weight": random(1, RANK, NOPE), "attn_v_b.weight": random(1, NOPE, RANK),
        "attn_output.weight": random(HIDDEN, NOPE), "exp_probs_b.bias": random(EXPERTS),
    }


def sinks():
    layer = block(HIDDEN, WIDTH, EXPERTS, bias=True)
    del layer["ffn_norm.weight"]
    return layer | {
        "post_attention_norm.weight": random(HIDDEN), "attn_output.bias": random(HIDDEN), "attn_sinks.weight": random(1),
        "ffn_gate_inp.bias": random(EXPERTS), "ffn_gate_exps.bias": random(EXPERTS, WIDTH),
        "ffn_up_exps.bias": random(EXPERTS, WIDTH), "ffn_down_exps.bias": random(EXPERTS, HIDDEN),
    }


def k_blocks(form, rows):
    """Any bytes, with scales of a weight's size."""
    bytes_of, scales_at = {Form.Q4_K: (144, [0, 2]), Form.Q6_K: (210, [208])}[form]
    blocks = RNG.integers(0, 256, (rows, bytes_of), dtype=np.uint8)
    for at in scales_at:
        blocks[:, at : at + 2] = np.full((rows, 1), 3e-4, np.float16).view(np.uint8)
    return form, blocks


def forms(name, down):
    """Blocks of 32 along the width, or of 256 in what leads back from it."""
    form, width = down, 256 if down in (Form.Q4_K, Form.Q6_K) else 32
    layer = block(HIDDEN, width, 0)
    if form in (Form.Q4_K, Form.Q6_K):
        layer["ffn_down.weight"] = k_blocks(form, HIDDEN)
    else:
        layer["ffn_down.weight"] = form, quantize(layer["ffn_down.weight"], form)
    write(name, "llama", layer, lambda writer: writer.add_rope_dimension_count(HIDDEN), width=width)


write("llama", "llama", block(HIDDEN, WIDTH, 0), lambda writer: writer.add_rope_dimension_count(HIDDEN), pre="smollm")
write("mixtral", "llama", block(HIDDEN, WIDTH, EXPERTS), experts)
write("olmoe", "olmoe", block(HIDDEN, WIDTH, EXPERTS, qk_norm=True), experts, pre="olmo")
write("qwen2moe", "qwen2moe", block(HIDDEN, WIDTH, EXPERTS, bias=True) | shared(WIDTH, True), qwen2moe, pre="qwen2")
write("qwen3moe", "qwen3moe", block(HIDDEN, WIDTH, EXPERTS, qk_norm=True), qwen3moe, pre="qwen2")
write("deepseek2", "deepseek2", latent(), deepseek2, pre="deepseek-llm")
write("gpt-oss", "gpt-oss", sinks(), gpt_oss, pre="gpt-4o")
for form in [Form.Q8_0, Form.Q4_0, Form.Q4_1, Form.F16, Form.BF16, Form.Q4_K, Form.Q6_K]:
    forms(form.name.lower(), form)
