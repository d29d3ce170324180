"""Dispatch: which backend runs what, and the sentences where none can."""

import os
import subprocess
import sys

import pytest
import torch

from blnet.kernels import available_backends, forced_backend, merge, use_backend
from blnet.kernels.backend import choose_backend

NO_GPU = not torch.cuda.is_available()


@pytest.fixture(autouse=True)
def automatic():
    use_backend("auto")
    yield
    use_backend("auto")


def maps(**options):
    return torch.randn(1, 2, 2, 2, **options), torch.randn(1, 2, 4, 4, **options)


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_context_manager_nests_and_restores():
    assert forced_backend() is None
    with use_backend("torch"):
        assert forced_backend() == "torch"
        with use_backend("auto"):
            assert forced_backend() is None
        assert forced_backend() == "torch"
    assert forced_backend() is None


def test_context_manager_restores_after_an_error():
    with pytest.raises(KeyError), use_backend("torch"):
        raise KeyError
    assert forced_backend() is None


def test_plain_call_stays():
    use_backend("torch")
    assert forced_backend() == "torch"
    use_backend("auto")
    assert forced_backend() is None


def test_unknown_name():
    with pytest.raises(ValueError, match=r"no backend 'cuda'; choose one of 'auto', 'triton', 'in"):
        use_backend("cuda")
    assert forced_backend() is None


@pytest.mark.skipif(not NO_GPU, reason="this machine has a GPU: the backend works")
def test_unavailable_triton_says_what_to_do():
    with pytest.raises(ValueError, match=r"'triton' does not work here because .*; run on a mach"):
        use_backend("triton")


def test_unavailable_interpreter_says_what_to_do():
    with pytest.raises(ValueError, match=r"'interpret' does not work here .*; set TRITON_INTERPR"):
        use_backend("interpret")


def test_every_backend_has_a_reason_and_every_broken_one_advice():
    backends = available_backends()
    assert list(backends) == ["triton", "interpret", "torch"]
    assert backends["torch"].works
    for status in backends.values():
        assert status.reason
        assert bool(status.advice) != status.works


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_automatic_choice_without_a_gpu(device):
    assert choose_backend("op", torch.empty(1, device=device)) == "torch"


def test_automatic_choice_on_a_gpu():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert choose_backend("op", torch.empty(1, device="cuda")) == "triton"
        double = torch.empty(1, device="cuda", dtype=torch.float64)
        assert choose_backend("op", double) == "torch"


def test_forced_triton_refuses_what_it_cannot_run(monkeypatch):
    from blnet.kernels import backend

    monkeypatch.setattr(backend, "_forced", "triton")
    with pytest.raises(
        ValueError, match=r"merge: backend 'triton' cannot run tensors on device 'c"
    ):
        merge(*maps())
    with pytest.raises(ValueError, match=r"merge: backend 'triton' cannot run torch\.float64"):
        merge(*maps(dtype=torch.float64))


def test_compile_reads_the_choice_without_a_graph_break():
    def forced(x):
        return x + 1 if forced_backend() == "torch" else x

    compiled = torch.compile(forced, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 0
    with use_backend("torch"):
        assert compiled(torch.zeros(1)) == 1
    assert compiled(torch.zeros(1)) == 0


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from blnet.kernels import available_backends, merge, use_backend
out = merge(torch.ones(1, 2, 2, 2), torch.ones(1, 2, 4, 4))
assert (out == 2).all() and out.shape == (1, 2, 4, 4)
status = available_backends()
print(status["triton"].works, status["triton"].advice, status["interpret"].works)
for name in ("triton", "interpret"):
    try:
        use_backend(name)
    except ValueError as error:
        print(error)
from blnet.kernels.merge import _forward_kernel
try:
    _forward_kernel[(1,)]()
except ImportError as error:
    print(error)
from blnet.kernels import aot
try:
    aot.check_ready([])
except ValueError as error:
    print(error)
"""


def test_everything_but_the_kernels_works_without_triton():
    lines = python(WITHOUT_TRITON).splitlines()
    assert lines[0] == "False install it with: pip install triton False"
    assert len(lines) == 5
    assert all("pip install triton" in line for line in lines)


def test_setting_the_interpreter_too_late_changes_nothing():
    code = (
        "import os, blnet.kernels as k; os.environ['TRITON_INTERPRET'] = '1';"
        "print(k.available_backends()['interpret'].works)"
    )
    assert python(code, TRITON_INTERPRET="0").strip() == "False"


def test_kernels_import_only_torch_triton_and_the_standard_library():
    code = (
        "import sys, torch, triton.language, torch._inductor.utils, torch.library;"
        "before = {n.split('.')[0] for n in sys.modules};"
        "import blnet.kernels, blnet.kernels.command, blnet.kernels.testing;"
        "after = {n.split('.')[0] for n in sys.modules};"
        "print(sorted(after - before - set(sys.stdlib_module_names)))"
    )
    assert python(code).strip() == "['blnet']"
