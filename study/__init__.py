"""The over-optimisation study: a matrix of reward models and policies, and what it shows."""
