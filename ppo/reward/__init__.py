"""Rewards of the user's own, and their mixture with those of reward models."""
