"""From a Hugging Face checkpoint and an adapter to a 4-bit GGUF.

One module a step: `qcat.workflows.export` puts them in order. Knows nothing of training, of proofs
or of the command line. torch, transformers, peft and gguf are imported where they are used.
"""
