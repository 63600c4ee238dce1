"""Rewards over HTTP: the server and its client."""
