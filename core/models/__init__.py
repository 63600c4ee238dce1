"""Causal language models: loading, hidden states and frozen layers, log-probs, adapters."""

from __future__ import annotations

from typing import Any, TypeAlias

CausalLM: TypeAlias = Any
"""A causal language model of transformers, or PEFT's wrapper around one.

Any to a type checker: what such a model has depends on its architecture and its adapters, and torch declares every
attribute that it does not know as Tensor or Module.
"""
