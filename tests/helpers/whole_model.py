"""A merged model as transformers and PEFT make it when they have it whole, the reference; and as
`Merger` gives it, part by part.
"""

from __future__ import annotations

import json

import torch
from qcat_convert.merge import Merger
from qcat_convert.source import locate


def whole(adapter, base=None):
    """In float32, in evaluation mode."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if base is None:
        base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter:
        rows = locate(adapter, str(base)).vocabulary_rows
        if rows != model.config.vocab_size:
            model.resize_token_embeddings(rows, mean_resizing=False)
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload(safe_merge=True)
    return model.eval()


def parts(adapter, base=None):
    """All merged tensors by name, and the merger."""
    merger = Merger(locate(adapter, base))
    found = {"model.embed_tokens.weight": torch.cat(list(merger.embedding().chunks())).float()}
    for number, layer in enumerate(merger.layers()):
        for name, tensor in layer.state_dict().items():
            found[f"model.layers.{number}.{name}"] = tensor.clone()
    found["model.norm.weight"] = merger.norm().weight
    found["lm_head.weight"] = torch.cat(list(merger.head().chunks())).float()
    return found, merger


def put_together(adapter):
    """The model of what the merger gives, in float32, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    found, merger = parts(adapter)
    model = AutoModelForCausalLM.from_config(merger.config, dtype=torch.float32)
    model.load_state_dict(found)
    return model.eval()
