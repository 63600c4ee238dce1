"""Sampling with vLLM, in the process of the stage or on servers."""
