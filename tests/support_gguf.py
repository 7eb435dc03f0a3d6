"""Tiny GGUF files of several architectures: random weights at eight bits, and a byte-level or sentencepiece vocabulary."""

from __future__ import annotations

import gguf
import numpy as np
from transformers.convert_slow_tokenizer import bytes_to_unicode

WIDTH, DEPTH, HEADS, KEYS, HEAD = 64, 4, 4, 2, 16
INNER, LENGTH = 256, 1024  # of GPT-2 transformers (5.23) reads neither from the file


def write_gguf(path, architecture, seed=0):
    """Writes a model of four blocks of width 64; `architecture` is llama, qwen2, gemma2 or gpt2."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, architecture)
    tokens = _vocabulary(writer, sentencepiece=architecture == "gemma2")
    writer.add_name(f"tiny {architecture}")
    writer.add_context_length(LENGTH)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(DEPTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    if architecture == "gpt2":
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_head_count_kv(KEYS)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(10_000.0)
        writer.add_vocab_size(tokens)
    if architecture == "llama":
        writer.add_rope_dimension_count(HEAD)
    if architecture == "gemma2":
        writer.add_key_length(HEAD)
        writer.add_value_length(HEAD)
        writer.add_sliding_window(64)
    for name, shape in _shapes(architecture, tokens).items():
        if len(shape) == 1:
            value = np.ones(shape) if name.endswith("norm.weight") else np.zeros(shape)
            writer.add_tensor(name, value.astype(np.float32))
            continue
        value = rng.normal(size=shape).astype(np.float32) * shape[-1] ** -0.5
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(architecture, tokens):
    """The tensors of a file, rows first."""
    width, keys = HEADS * HEAD, KEYS * HEAD
    shapes = {"token_embd.weight": (tokens, WIDTH), "output_norm.weight": (WIDTH,)}
    for i in range(DEPTH):
        block = {"attn_norm.weight": (WIDTH,), "ffn_norm.weight": (WIDTH,), "attn_output.weight": (WIDTH, width)}
        if architecture == "gpt2":
            block |= {f"{name}_norm.bias": (WIDTH,) for name in ("attn", "ffn")}
            block |= {"attn_qkv.weight": (3 * WIDTH, WIDTH), "attn_qkv.bias": (3 * WIDTH,), "attn_output.bias": (WIDTH,)}
            block |= {"ffn_up.weight": (INNER, WIDTH), "ffn_up.bias": (INNER,)}
            block |= {"ffn_down.weight": (WIDTH, INNER), "ffn_down.bias": (WIDTH,)}
        else:
            block |= {"attn_q.weight": (width, WIDTH), "attn_k.weight": (keys, WIDTH), "attn_v.weight": (keys, WIDTH)}
            block |= {"ffn_up.weight": (INNER, WIDTH), "ffn_gate.weight": (INNER, WIDTH), "ffn_down.weight": (WIDTH, INNER)}
        if architecture == "qwen2":
            block |= {"attn_q.bias": (width,), "attn_k.bias": (keys,), "attn_v.bias": (keys,)}
        if architecture == "gemma2":
            block |= {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
        shapes |= {f"blk.{i}.{name}": shape for name, shape in block.items()}
    if architecture == "gpt2":
        shapes |= {"output_norm.bias": (WIDTH,), "position_embd.weight": (LENGTH, WIDTH)}
    return shapes


def _vocabulary(writer, sentencepiece):
    """Writes a vocabulary in which `oslo` has several pieces; returns its size, a multiple of 32."""
    kind = gguf.TokenType
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    if sentencepiece:
        pieces = [*letters, "\u2581", *("\u2581" + c for c in letters), "\u2581the", "\u2581an", "\u2581ann", "\u2581anna"]
    else:
        space = bytes_to_unicode()[ord(" ")]
        pieces = [*bytes_to_unicode().values(), space + "t", space + "th", space + "the", space + "a", space + "an"]
    tokens = list(dict.fromkeys([*special, *pieces]))
    tokens += [f"<unused{i}>" for i in range(-len(tokens) % 32)]
    controls = [t in special or t.startswith("<unused") for t in tokens]
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([kind.CONTROL if c else kind.NORMAL for c in controls])
    if sentencepiece:
        writer.add_token_scores([-float(i) for i in range(len(tokens))])
    else:
        writer.add_token_merges([f"{space} t", f"{space}t h", f"{space}th e", f"{space} a", f"{space}a n"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(3)
    return len(tokens)
