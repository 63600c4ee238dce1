"""Statistics of over-optimisation, on arrays: no models, no files."""
