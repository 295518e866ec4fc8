"""What is good: pure reward functions of one sample, their registry and their weighted sum."""
