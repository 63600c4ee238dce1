"""Layouts of published preference data: how each is told by its columns, and what a row of it is read as."""
