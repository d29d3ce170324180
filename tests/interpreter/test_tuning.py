"""Every tunable kernel with other block sizes than its rule's, in Triton's interpreter."""

import importlib

import pytest
import torch

from blnet.kernels import expand_merge, testing, tune, tuning
from blnet.kernels.bottleneck_close import CloseProblem
from blnet.kernels.expand_merge_sizes import Problem
from blnet.kernels.launch import Launch
from blnet.kernels.stem_close import StemProblem
from blnet.kernels.tuning import TUNABLES

# "blnet.kernels.expand_merge" as an attribute is the function; this is the module.
forward_module = importlib.import_module("blnet.kernels.expand_merge")
CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16)
# Smaller than any site: rows and channels that fill no tile, and several tiles of the smaller ones.
SMALL = {
    **{f"expand_merge {part}": (2, 40, 72, 10, 6, 5, 3) for part in ("forward", "reduce", "input")},
    "moments": (150, 72),
    **{f"merge {part}": ((2, 10, 6, 72), (5, 3)) for part in ("forward", "backward")},
}


# These multiply 16-bit numbers only.
SIXTEEN_BITS = {
    "bottleneck alone": CloseProblem(48, Problem(2, 80, 80, 10, 6, 10, 6, 2), False),
    "bottleneck chained": CloseProblem(48, Problem(2, 80, 112, 10, 6, 5, 3, 2), True),
    "stem": StemProblem(2, 48, 80, 48, 80, 112, 5, 3, (10, 6), (10, 6)),
}
DTYPE = {name: torch.bfloat16 if name in SIXTEEN_BITS else torch.float32 for name in TUNABLES}


def small(name, itemsize):
    if name in SIXTEEN_BITS:
        return SIXTEEN_BITS[name]
    if name not in SMALL:
        return list(TUNABLES[name].problems(1, itemsize).values())[-1]
    sizes = (*SMALL[name], itemsize)
    return Problem(*sizes) if name.startswith("expand_merge") else sizes


def choices_of(name, itemsize):
    """Return a kernel's smallest choice and its largest, and one with narrow channels."""
    tunable = TUNABLES[name]
    found = tuning.candidates(tunable, small(name, itemsize))
    blocks = [torch.tensor([c[b] for b in tunable.blocks]).prod().item() for c in found]
    smallest = {block: max(least, 4) for block, (least, _) in tunable.blocks.items()}
    chosen = [found[blocks.index(min(blocks))], found[blocks.index(max(blocks))]]
    return [*chosen, {**smallest, "num_warps": 1, "num_stages": 1}]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in TUNABLES
        for dtype in DTYPES
        if dtype is not torch.float32 or name not in SIXTEEN_BITS
    ],
    ids=str,
)
def test_every_choice_gives_the_same_results(name, dtype):
    tunable = TUNABLES[name]
    call = tunable.call(small(name, dtype.itemsize), dtype, CPU)
    expected = call()
    assert all(t.isfinite().all() for t in expected)
    for choice in choices_of(name, dtype.itemsize):
        with tuning.forced(name, choice), testing.poisoned_outputs():
            got = call()
        for one, other in zip(got, expected, strict=True):
            assert tune.disagreement(one, other, dtype) == "", choice


@pytest.mark.parametrize("name", TUNABLES)
def test_the_forced_choice_is_what_is_launched(name, monkeypatch):
    tunable, dtype = TUNABLES[name], DTYPE[name]
    choice = choices_of(name, dtype.itemsize)[-1]
    call = tunable.call(small(name, dtype.itemsize), dtype, CPU)
    launches, choose = [], tuning.choose

    def noted(kernel, *question):
        launches.append((kernel, choose(kernel, *question)))
        return launches[-1][1]

    monkeypatch.setitem(tunable.plan.__globals__, "choose", noted)
    with tuning.forced(name, choice):
        call()
    assert launches == [(name, choice)]


@pytest.mark.parametrize("name", TUNABLES)
def test_a_whole_measurement_of_the_real_kernels(name):
    tunable, dtype = TUNABLES[name], DTYPE[name]
    candidates = choices_of(name, dtype.itemsize)

    def timer(call):
        call()
        return 1.0 + 9.0 * (tuning._forced[name] != candidates[0])

    narrowed = tuning.Tunable(**{**vars(tunable), "candidates": lambda problem: candidates})
    site = tune.measure(narrowed, small(name, dtype.itemsize), dtype, CPU, timer)
    assert (site.choice, site.best, site.rule) == (candidates[0], 1.0, 10.0)
    assert site.measured >= 2
    assert (site.unfit, site.wrong) == (0, [])


def test_a_choice_serves_sizes_smaller_than_its_tiles():
    # A table's bucket holds many sizes; blocks are cut to the channels that are there.
    x, weight = torch.randn(1, 3, 5, 5), torch.randn(4, 3)
    plain = expand_merge(x, weight)
    names = ("BLOCK_ROWS", "BLOCK_C", "BLOCK_K")
    choice = {**dict.fromkeys(names, 128), "num_warps": 4, "num_stages": 3}
    with tuning.forced("expand_merge forward", choice):
        testing.assert_close(expand_merge(x, weight), plain.double())


def test_a_choice_that_leaves_elements_unwritten_is_dropped(monkeypatch):
    # They would hold what the run before them left there: the right results.
    name = "expand_merge forward"
    tunable, problem = TUNABLES[name], small(name, 4)
    good, bad = choices_of(name, 4)[:2]
    launch_of = forward_module.forward_launch

    def short(problem, choice=None, **flags):
        plan = launch_of(problem, choice, **flags)
        grid = (plan.grid[0] - (choice == bad),)
        return Launch(grid, plan.integers, plan.constants, plan.num_warps, plan.num_stages)

    monkeypatch.setattr(forward_module, "forward_launch", short)
    narrowed = tuning.Tunable(**{**vars(tunable), "candidates": lambda problem: [good, bad]})
    site = tune.measure(narrowed, problem, torch.float32, CPU, lambda call: 1.0)
    assert site.measured == 1
    assert len(site.wrong) == 1
    assert "NaN where the rule has none" in site.wrong[0]
