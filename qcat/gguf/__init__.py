"""The GGUF format: checks of files before llama.cpp reads them, and qcat's metadata in them."""
