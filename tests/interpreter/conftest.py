"""Tests that run the kernels in Triton's interpreter. They need a process of their own.

``@triton.jit`` reads TRITON_INTERPRET when a kernel is defined, so one process either interprets
kernels (these tests) or compiles them (tests/test_kernels_aot.py). Run them by::

    pytest tests/interpreter
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ALONE = (
    "the interpreter tests need a process of their own: run 'pytest tests/interpreter' and "
    "'pytest tests --ignore=tests/interpreter' one after the other"
)

if "blnet.kernels.triton_shim" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(ALONE)
os.environ["TRITON_INTERPRET"] = "1"
# The interpreter works on small arrays, where threads only get in each other's way.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config):
    """Leave out the interpreter's check of every integer sum, which takes half of its time.

    It looks for sums and products beyond 32 bits, and the maps here are far too small for one.
    ``make test-deep`` checks them.
    """
    if os.environ.get("BLNET_DEEP"):
        return
    from triton.runtime.interpreter import interpreter_builder as builder

    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def pytest_collection_finish(session):
    if any(HERE not in item.path.parents for item in session.items):
        raise pytest.UsageError(ALONE)
    from blnet.kernels import available_backends

    if not available_backends()["interpret"].works:
        raise pytest.UsageError(f"no interpreter: {available_backends()['interpret'].reason}")
