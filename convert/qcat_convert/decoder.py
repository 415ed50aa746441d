"""Runs one decoder layer at a time with transformers' own code.

transformers handles positions, masks and rotary embeddings; only one layer's weights are needed.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class OneLayer:
    """A decoder that consists of whichever layer it is given.

    Args:
        config: of the whole model.
    """

    def __init__(self, config: Any) -> None:
        from accelerate import init_empty_weights
        from torch import nn
        from transformers import AutoModel

        config = deepcopy(config)
        kinds = sorted(set(getattr(config, "layer_types", None) or ()))
        if kinds:
            config.layer_types = kinds  # rotary embeddings are made for those that stand here
        config.num_hidden_layers = max(1, len(kinds))
        with init_empty_weights():
            made = AutoModel.from_config(config)  # type: ignore[no-untyped-call]
        self._decoder: Any = made.eval()
        self._decoder.norm = nn.Identity()
        self._decoder.config.num_hidden_layers = 1

    def run(self, layer: Any, states: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Hidden states after a layer.

        Args:
            layer: layer of the whole model, or any module in its place.
            states: hidden states before it, (rows, tokens, hidden).
            cache: a `DynamicCache` of one layer with the earlier tokens; these tokens are added.
        """
        import torch

        layer.self_attn.layer_idx = 0  # the cache holds only this layer
        if kind := getattr(layer.self_attn, "layer_type", None):
            self._decoder.config.layer_types = [kind]  # of which masks are made
        self._decoder.layers[0] = layer
        with torch.inference_mode():
            output = self._decoder(inputs_embeds=states, cache=cache, use_cache=cache is not None)
        return torch.as_tensor(output.last_hidden_state)
