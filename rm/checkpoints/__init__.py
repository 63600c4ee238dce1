"""Reading and writing reward models, ours and other people's."""
