"""What happens inside the gradient: advantages, surrogates, the policy, and one optimizer step from one table."""
