"""A task in a model's tokens: prompt, tokenization, label trie, grammar, scoring. No backend."""
