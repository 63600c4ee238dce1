"""The pages, tables and figures of the study."""
