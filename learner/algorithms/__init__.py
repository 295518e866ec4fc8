"""Algorithms: what each makes of rewards, and its loss."""
