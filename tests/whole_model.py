"""A merged model as transformers and PEFT make it when they have it whole: the reference."""

from __future__ import annotations

import json

import torch

from convert.merge import locate


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
