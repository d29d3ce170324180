"""Benchmarks: suites, the harness that takes the times, and the report.

`blnet bench` is the command; the suites are pytest files under `bench/suites`, which plain pytest
runs as well. This module imports nothing, so that importing it costs nothing.

How the parts fit together: a suite (`suites/test_*.py`) declares groups of implementations that
compete on the same input; `measure` times a group, interleaved; `session` keeps what was measured;
`replay` hands the samples to pytest-benchmark; `summary` and `report` turn them into tables.
"""
