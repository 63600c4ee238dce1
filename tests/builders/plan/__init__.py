"""For tests of `grm plan`."""
