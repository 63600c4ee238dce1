"""What docs/ shows of this project's own runs."""
