"""Data: rows, prompts and their order."""
