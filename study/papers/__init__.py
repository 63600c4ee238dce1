"""The figures of the papers, from what a study has written."""
