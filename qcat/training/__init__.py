"""Fine-tuning: the trained weights, the objective, the loop, the folder of a run."""
