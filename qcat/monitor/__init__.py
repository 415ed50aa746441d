"""A model in use: the log of its answers, drift, and the queue of questions for review."""
