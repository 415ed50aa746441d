"""The base model: from the hub, a folder, a GGUF file or Ollama's store."""
