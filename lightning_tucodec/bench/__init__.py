"""Benchmarks, each measured beside a reference."""
