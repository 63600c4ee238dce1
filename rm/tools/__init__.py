"""Export and merging of trained reward models."""
