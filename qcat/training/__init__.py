"""Fine-tuning: what is trained of a base, the objective, the loop, the folder of a run."""
