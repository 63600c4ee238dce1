"""Layouts of scores that other tools write, one file each."""
