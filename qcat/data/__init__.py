"""Labelled questions: reading and writing, lint, near duplicates, splits. Knows no model."""
