"""Rewards: pure functions that score one sample, their registry, their weighted sum, and the process that runs them."""
