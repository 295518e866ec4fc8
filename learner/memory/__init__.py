"""The memory plan: what fits on the card is decided before anything loads."""
