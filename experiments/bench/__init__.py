"""Benchmarks: timings and sizes, each by one command."""
