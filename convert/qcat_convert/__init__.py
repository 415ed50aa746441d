"""From a Hugging Face checkpoint and an adapter to a 4-bit GGUF.

One module per step; `qcat.workflows.export` runs them in order. Independent of training, of
verification and of the command line. torch, transformers, peft and gguf are imported where they are
used.
"""
