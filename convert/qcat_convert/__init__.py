"""From a Hugging Face checkpoint and a PEFT adapter to a 4-bit GGUF, with proof.

One module a step, in the order of `pipeline.export`. Knows nothing of training or of the command
line. torch, transformers, peft and gguf are imported where they are used.
"""
