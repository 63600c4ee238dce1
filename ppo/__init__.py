"""Proximal policy optimisation with vLLM rollouts and DeepSpeed engines."""
