"""What a compiler sees of the tables: block sizes in the traced graph, no size fixed by them."""

import importlib

import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from blnet.kernels import bottleneck, expand_merge, merge, moments, stem, tuning, tuning_tables
from blnet.kernels.tuning import TUNABLES
from blnet.kernels.tuning_tables import Entry, Table


class AllForward(torch.nn.Module):
    def forward(self, x, weight, big):
        out = expand_merge(x, weight, big=big)
        return out, merge(big, out), *moments(x)


class Blocks(torch.nn.Module):
    def forward(self, x, weight):
        layers = (weight[:16], None, x.new_empty(16, 16, 3, 3), None, weight[:64, :16], None)
        return (
            bottleneck(x, *layers, weight_expand=weight),
            bottleneck(x, *layers),
            stem(x, x[:, :16], weight[:64, :16], None, weight, None),
        )


def traced_calls(module, *arguments):
    graph, _ = aot_export_module(module, arguments, trace_joint=False)
    return [n.kwargs for n in graph.graph.nodes if "triton_kernel_wrapper" in str(n.target)]


def kernel_calls(*arguments):
    calls = traced_calls(AllForward(), *arguments)
    return {frozenset(call["kwargs"]) & {"p_weight", "p_little", "p_gram"}: call for call in calls}


CHOICES = {
    "expand_merge forward": (
        "2 bytes, K=64, C=128, x2, rows 2^7",
        "p_weight",
        {"BLOCK_ROWS": 64, "BLOCK_C": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    ),
    "merge forward": (
        "2 bytes, C=128, x2, rows 2^7",
        "p_little",
        {"BLOCK_ROWS": 2, "BLOCK_INNER": 32, "num_warps": 1, "num_stages": 1},
    ),
    "moments": (
        "2 bytes, K=64, rows 2^7",
        "p_gram",
        {"BLOCK_ROWS": 16, "BLOCK": 32, "num_warps": 2, "num_stages": 2},
    ),
}


BLOCK_CHOICES = {
    kernel: (key, "", {**dict.fromkeys(blocks.split(), 16), "num_warps": 2, "num_stages": 1})
    for kernel, key, blocks in (
        ("bottleneck chained", "2 bytes, I=16, C=64 to 128, same, rows 2^7",
         "BLOCK_ROWS BLOCK_K BLOCK_OUT"),
        ("bottleneck alone", "2 bytes, I=16, C=64, rows 2^7", "BLOCK_ROWS BLOCK_K BLOCK_C"),
        ("stem", "2 bytes, L=16, C=64 to 128, rows 2^7",
         "BLOCK_ROWS BLOCK_X BLOCK_LITTLE BLOCK_OUT"),
    )
}  # fmt: skip


def write_choices(folder):
    known = {**CHOICES, **BLOCK_CHOICES}
    entries = {kernel: {key: Entry(choice, 1.0, 2.0)} for kernel, (key, _, choice) in known.items()}
    table = Table("NVIDIA Test 9000", "sm_90", "2.11", "3.6", "2025-01-01", entries)
    tuning_tables.write(table, folder)


def test_traced_kernels_run_with_the_tables_choices(folders, driver):
    write_choices(folders[0])
    with FakeTensorMode():
        sizes = ((2, 64, 8, 8), (128, 64, 1, 1), (2, 128, 4, 4))
        calls = kernel_calls(
            *(torch.empty(s, device="cuda", dtype=torch.bfloat16,
                          memory_format=torch.channels_last) for s in sizes)
        )  # fmt: skip
    for _, pointer, choice in CHOICES.values():
        constants = calls[frozenset({pointer})]["kwargs"]
        assert {n: v for n, v in constants.items() if n in choice} == {
            n: v for n, v in choice.items() if n in constants
        }


def test_traced_blocks_run_with_the_tables_choices(folders, driver):
    write_choices(folders[0])
    with FakeTensorMode():
        x, weight = (
            torch.empty(size, device="cuda", dtype=torch.bfloat16)
            for size in ((2, 64, 8, 8), (128, 64))
        )
        calls = [call["kwargs"] for call in traced_calls(Blocks(), x, weight)]
    calls = [call for call in calls if call.keys() & {"p_h", "p_fusion"}]
    for call, (kernel, (_, _, choice)) in zip(calls, BLOCK_CHOICES.items(), strict=True):
        blocks = TUNABLES[kernel].blocks
        assert {name: call[name] for name in blocks} == {name: choice[name] for name in blocks}


def test_open_sizes_run_with_the_rule_and_are_not_fixed(folders, driver, monkeypatch):
    write_choices(folders[0])
    keys, choose = [], tuning.choose
    for module in ("merge", "moments", "expand_merge", "bottleneck_close", "stem_close"):
        target = importlib.import_module(f"blnet.kernels.{module}")
        monkeypatch.setattr(target, "choose", lambda *a: keys.append(a[:2]) or choose(*a))
    environment = ShapeEnv()
    mode = FakeTensorMode(shape_env=environment, static_shapes=False)
    is_open = [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.DYNAMIC]
    context = StatelessSymbolicContext(dynamic_sizes=is_open)
    sizes = [
        mode.from_tensor(torch.empty(shape, device="meta"), symbolic_context=context).shape
        for shape in ((2, 64, 8, 8), (2, 128, 4, 4))
    ]
    with mode:
        x, big = (torch.empty(size, device="cuda", dtype=torch.bfloat16) for size in sizes)
        weight = torch.empty(128, 64, device="cuda", dtype=torch.bfloat16)
        kernel_calls(x, weight, big)
        traced_calls(Blocks(), x, weight)
    assert set(keys) == {(kernel, None) for kernel in (*CHOICES, *BLOCK_CHOICES)}
    # Both maps have the same batch, and PyTorch asks whether the workspace of moments has one row.
    assert len(environment.guards) <= 2
    asked = [str(guard.sloc.framework_loc) for guard in environment.guards]
    assert not any("tuning" in place or "_sizes.py" in place for place in asked), asked
