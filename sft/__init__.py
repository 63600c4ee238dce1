"""Supervised fine-tuning of the policy."""
