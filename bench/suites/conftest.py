"""Makes the suites run under plain `pytest bench/suites`; see `blnet.bench.plugin`."""

from blnet.bench.plugin import measured, pytest_generate_tests

__all__ = ["measured", "pytest_generate_tests"]
