"""For tests of the shipped configurations and of published models."""
