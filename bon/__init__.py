"""Best-of-n: sample pools, unbiased estimators of what selection by a proxy yields."""
