"""Measurements that claims rest on, each one command: `python -m benchmarks.<name>`."""
