"""What happens between two turns: environments, their tools, and the calls that models write."""
