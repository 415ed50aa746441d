"""Monitoring a model in use: log of answers, drift, and the review queue."""
