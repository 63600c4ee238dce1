"""Messages, chat templates, splits, random streams, and preference data in its published layouts."""
