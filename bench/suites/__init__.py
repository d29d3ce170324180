"""Benchmark suites: pytest-benchmark files, one for each subject."""
