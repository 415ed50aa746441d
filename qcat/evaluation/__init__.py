"""Model quality: metrics, comparison, baselines, the verification of an export."""
