"""How well a model does: figures, comparison, baselines, the proof of an export."""
