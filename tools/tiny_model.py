"""Tiny models in the architectures that qcat converts, made in seconds from nothing.

For the demo, the tests and the benchmarks: the tokenizer is trained on the texts given, the
weights are random. `pytest` and `bench/` put this folder on the path.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GEMMA_SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
CONFIGS = {
    "qwen3": Qwen3Config,
    "qwen2": Qwen2Config,
    "llama": LlamaConfig,
    "gemma3": Gemma3TextConfig,
}
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_tokenizer(
    folder: Path,
    texts: Iterable[str],
    *,
    kind: str = "qwen3",
    size: int = 2048,
    added: Iterable[AddedToken] = (),
) -> int:
    """Train a BPE tokenizer of a kind and save it; return its number of tokens."""
    if kind == "gemma3":
        return _make_sentencepiece(folder, texts, size, added)
    tokenizer = Tokenizer(BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "llama")
    if kind == "llama":
        first = pre_tokenizers.Digits(individual_digits=True)
    else:
        tokenizer.normalizer = normalizers.NFC()
        first = pre_tokenizers.Split(Regex(QWEN2_SPLIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    if kind == "qwen3":
        tokenizer.add_tokens([AddedToken(t, normalized=False) for t in ("<think>", "</think>")])
    tokenizer.add_tokens(list(added))
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def _make_sentencepiece(
    folder: Path, texts: Iterable[str], size: int, added: Iterable[AddedToken]
) -> int:
    """As `make_tokenizer`, in SentencePiece's way as Gemma's `tokenizer.json` has it."""
    tokenizer = Tokenizer(BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[*GEMMA_SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))],
        max_token_length=16,
        show_progress=False,
    )
    words = ["▁" + word for text in texts for word in text.split(" ")]
    tokenizer.train_from_iterator(words, trainer)
    spec = json.loads(tokenizer.to_str())
    # SentencePiece merges any two tokens that make one, the likeliest first.
    vocab = spec["model"]["vocab"]
    ranks = {"".join(pair): rank for rank, pair in enumerate(spec["model"]["merges"])}
    spec["model"]["merges"] = [
        [token[:at], token[at:]]
        for token in sorted(ranks, key=ranks.__getitem__)
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    special = set(GEMMA_SPECIAL)
    spec["added_tokens"] = [one for one in spec["added_tokens"] if one["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    breaks = [AddedToken("\n" * count, normalized=False) for count in (1, 2)]
    tokenizer.add_tokens([*breaks, *added])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    roles = {f"{role}_token": f"<{role}>" for role in ("bos", "eos", "pad", "unk")}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()


def make_base(
    folder: Path,
    *,
    kind: str = "qwen3",
    vocabulary: int,
    tied: bool = True,
    hidden: int = 256,
    layers: int | None = None,
    seed: int = 0,
    **more: Any,
) -> Any:
    """Save a base model with random weights to a folder and return it."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        # Of Gemma 3's layers each sixth alone sees all tokens.
        "num_hidden_layers": layers or (7 if kind == "gemma3" else 2),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": tied,
        "initializer_range": 0.05,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if kind in ("qwen3", "gemma3"):
        shape["head_dim"] = 32  # on purpose not hidden / heads
    if kind == "gemma3":
        shape |= {"query_pre_attn_scalar": 32, "sliding_window": 16}
        del shape["rope_parameters"]
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**shape | more))
    with torch.no_grad():  # norms of 1 and biases of 0 would hide a tensor that got lost
        for name, tensor in model.named_parameters():
            if tensor.ndim == 1:
                tensor.add_(torch.randn_like(tensor) * (0.1 if "norm" in name else 0.5))
    model.save_pretrained(folder)
    return model


def make_adapter(folder: Path, base: Any, base_name: str, *, seed: int = 1, **more: Any) -> Any:
    """Save a LoRA adapter with random, non-trivial weights for a base; return the PEFT model."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": LINEAR} | more
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "lora_" in name:
                tensor.normal_(std=0.1)
            elif "modules_to_save" in name:
                tensor.add_(torch.randn_like(tensor) * 0.05)
    model.peft_config["default"].base_model_name_or_path = base_name
    model.save_pretrained(folder)
    return model
