"""Studies with planted scores."""
