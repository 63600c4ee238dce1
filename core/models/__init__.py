"""Causal language models: loading, hidden states and frozen layers, log-probs, adapters."""
