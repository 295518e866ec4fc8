"""The replay: a persistent queue of scored groups, from which each row is used once."""
