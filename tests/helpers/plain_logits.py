"""Log-probabilities at every position, by plain llama.cpp and by torch."""

from __future__ import annotations

import numpy as np
import torch

from qcat.backends.llama import LlamaModel
from qcat.encoding.prompt import encode_segments

PROMPT = "When was the pool pump replaced?\nCategory: water heater, fence and 12 gutters"


def gguf_log_probabilities(path, ids):
    """Log-probabilities at every position, through a plain llama.cpp context: (tokens, vocab)."""
    import llama_cpp

    with LlamaModel(path) as model:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = params.n_batch = 512
        params.n_threads = params.n_threads_batch = 2
        context = llama_cpp.llama_init_from_model(model.handle, params)
        batch = llama_cpp.llama_batch_init(512, 0, 1)
        try:
            batch.n_tokens = len(ids)
            for at, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, at
                batch.n_seq_id[at], batch.seq_id[at][0], batch.logits[at] = 1, 0, 1
            assert llama_cpp.llama_decode(context, batch) == 0
            rows = [
                np.ctypeslib.as_array(
                    llama_cpp.llama_get_logits_ith(context, at), (model.n_vocab,)
                ).copy()
                for at in range(len(ids))
            ]
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
    return torch.log_softmax(torch.tensor(np.stack(rows)), -1).numpy()


def torch_log_probabilities(model, ids):
    with torch.inference_mode():
        return torch.log_softmax(model(torch.tensor([ids])).logits[0].float(), -1).numpy()


def walked_labels(path, classifier, question):
    """Each label's probability by evaluating it whole, in a context of its own: (labels,)."""
    encoded = classifier._encoded
    trie = encoded.trie
    ids = [*encoded.prefix, *encode_segments(encoded.prompt.rest(question), encoded.tokenizer)]
    found = []
    for sequence in trie.sequences:
        rows = gguf_log_probabilities(path, [*ids, *sequence])[len(ids) - 1 :]
        total = 0.0
        for depth, token in enumerate((*sequence, trie.end)):
            rivals = rows[depth][list(trie.children[sequence[:depth]])]
            total += rows[depth][token] - np.logaddexp.reduce(rivals)
        found.append(total)
    return np.exp(found)
