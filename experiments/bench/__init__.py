"""Benchmarks: one command measures each time or size."""
