"""Scores in the layouts of other tools."""
