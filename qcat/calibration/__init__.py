"""Whether to believe an answer: temperature, thresholds, prediction sets, the decision."""
