"""What happens outside the gradient: prompts, engines, scoring, the replay queue, and how they are run."""
