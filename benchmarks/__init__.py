"""Speed and memory, measured: `python -m benchmarks.<name>` prints one JSON line a result."""
