"""Sampling with vLLM, in the trainer's process or on servers."""
