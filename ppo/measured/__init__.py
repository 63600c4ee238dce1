"""What a run measures besides what it trains on: tables of rollouts, and evaluations on held-out prompts."""
