"""Reward models: Bradley-Terry and GRM training, scoring and evaluation."""
