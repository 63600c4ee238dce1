"""Metrics of reward models and published evaluation sets."""
