"""What runs a model: `llama` (llama.cpp in this process)."""
