"""Several learners that take one step together."""
