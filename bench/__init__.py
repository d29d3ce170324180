"""Benchmark suites, measuring and reports."""
