"""Reading and writing of reward models, in our own layouts and in those of other code."""
