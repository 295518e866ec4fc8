"""Runtimes: where workers live, and how their methods are called."""
