"""Messages and chat templates, rows of tables, splits, random streams, and published preference data."""
