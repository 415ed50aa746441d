"""A task as a model's tokens: prompt, tokenization, label trie, grammar, scoring. No backend."""
