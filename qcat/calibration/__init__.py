"""Whether to trust an answer: temperature, thresholds, prediction sets, the decision."""
