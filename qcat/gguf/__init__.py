"""The GGUF format: the check of files before llama.cpp sees them, and what qcat keeps in them."""
