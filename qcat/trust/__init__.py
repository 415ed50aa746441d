"""What decides whether to believe an answer. Sees predictions, never models or tokens."""
