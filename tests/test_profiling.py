"""Counts of parameters, MACs and activations."""

import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import blnet
import blnet.vision.models
from blnet import registry
from blnet.meta import meta_twin, run_on_meta
from blnet.network import BigLittleConfig, BigLittleNet


def small_network(**options):
    config = {"depths": (2, 3, 2), "widths": (32, 64, 64), "stem_width": 16, "num_classes": 10}
    return BigLittleNet(BigLittleConfig(**{**config, **options}))


@pytest.mark.parametrize("size", [(1, 3, 224, 224), (2, 3, 97, 131)], ids=str)
@pytest.mark.parametrize(
    "name",
    [
        "bl_resnet18",
        "bl_resnet50",
        "bl_seresnext50_32x4d",
        "resnet50",
        # Attention: products that are no layer of their own.
        "timm:vit_tiny_r_s16_p8_224",
    ],
)
def test_totals_are_those_of_torchs_counter(name, size):
    if name.startswith("timm"):
        pytest.importorskip("timm")
        size = (size[0], 3, 224, 224)
    with torch.device("meta"):
        model = registry.build(name).eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        model(torch.empty(size, device="meta"))
    counted = blnet.profile(model, size)
    assert counted.macs * 2 == counter.get_total_flops()
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert counted.input_size == size


def test_layers_add_up_and_are_what_formulas_say():
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    counted = blnet.profile(model, (3, 4, 9, 7))
    conv, norm, linear = counted.layers
    outputs = 3 * 8 * 5 * 4
    assert (conv.name, conv.kind, conv.output_shape) == ("0", "Conv2d", (3, 8, 5, 4))
    assert (conv.parameters, conv.macs) == (8 * 2 * 9 + 8, outputs * 2 * 9)
    assert conv.activations == outputs
    assert (norm.kind, norm.parameters, norm.macs, norm.activations) == ("BatchNorm2d", 16, 0, 0)
    assert (linear.macs, linear.activations, linear.parameters) == (3 * 8 * 5, 3 * 5, 8 * 5 + 5)
    assert counted.macs == sum(layer.macs for layer in counted.layers)
    assert counted.parameters == sum(layer.parameters for layer in counted.layers)
    assert counted.activations == sum(layer.activations for layer in counted.layers)


def test_layer_sums_match_hooks_in_a_real_network():
    model = small_network()
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(lambda m, _x, y, name=name: shapes.update({name: (m, y)}))
    model.eval()(torch.zeros(1, 3, 33, 47))
    expected = {}
    for name, (module, out) in shapes.items():
        expected[name] = (out.numel() * module.weight[0].numel(), out.numel(), tuple(out.shape))
    counted = blnet.profile(model, (1, 3, 33, 47))
    rows = {r.name: (r.macs, r.activations, r.output_shape) for r in counted.layers if r.macs}
    assert rows == expected


def test_a_layer_that_runs_twice_counts_its_work_twice_and_its_parameters_once():
    layer = nn.Linear(4, 4, bias=False)
    counted = blnet.profile(nn.Sequential(layer, nn.ReLU(), layer), (5, 4))
    assert (counted.parameters, counted.macs, counted.activations) == (16, 2 * 5 * 16, 2 * 5 * 4)


def test_tied_parameters_count_once():
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    counted = blnet.profile(nn.Sequential(first, second), (5, 4))
    assert (counted.parameters, counted.macs) == (16, 2 * 5 * 16)


def test_parameters_that_do_not_run_count_too():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = nn.Linear(4, 3), nn.Linear(7, 7)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return self.used(x) * self.scale

    counted = blnet.profile(Spare(), (2, 4))
    assert counted.parameters == (4 * 3 + 3) + (7 * 7 + 7) + 3
    assert {layer.name for layer in counted.layers} == {"", "used", "spare"}


def test_product_in_a_forward_method_counts_for_that_module():
    class Scores(nn.Module):
        def forward(self, x):
            return x @ x.transpose(1, 2)

    (layer,) = blnet.profile(Scores(), (2, 6, 4)).layers
    assert (layer.kind, layer.macs, layer.activations) == ("Scores", 2 * 6 * 4 * 6, 2 * 6 * 6)


class Making(nn.Module):
    """Makes tensors where it pleases, and reads the values of one."""

    def __init__(self):
        super().__init__()
        self.places, self.linear = nn.Embedding(50, 8), nn.Linear(8, 8)
        self.scales = torch.ones(8)

    def forward(self, x):
        length = x.shape[1]
        x = (x + self.places(torch.arange(length))) * self.scales
        later = torch.ones(length, length).triu(1).bool()
        x = (x @ x.transpose(1, 2)).masked_fill(later, float("-inf")).softmax(-1) @ x
        x = torch.cat([x, torch.zeros(x.shape[0], 1, 8)], dim=1)
        (factor,) = torch.linspace(2, 3, 1).tolist()
        return self.linear(x[:, torch.tensor([0, length])] * factor)


def test_a_network_may_make_tensors_itself():
    counted = blnet.profile(Making(), (2, 5, 8))
    own, _, linear = counted.layers
    assert own.macs == 2 * (5 * 8 * 5) * 2
    assert (linear.macs, linear.output_shape) == (2 * 2 * 8 * 8, (2, 2, 8))


def test_hooks_are_part_of_the_network():
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(3, 5))
    model[0].register_forward_hook(lambda module, inputs, output: output[:, :3])
    assert blnet.profile(model, (2, 4)).macs == 2 * (4 * 6 + 3 * 5)


def test_network_is_left_as_it_was():
    model = small_network()
    model.train()
    model.stages[0].eval()  # a frozen part must stay frozen
    flags = [module.training for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    identities = {key: id(value) for key, value in model.named_parameters()}
    grads = [p.requires_grad for p in model.parameters()]
    blnet.profile(model, (1, 3, 64, 64))
    assert [module.training for module in model.modules()] == flags
    assert [p.requires_grad for p in model.parameters()] == grads
    assert {key: id(value) for key, value in model.named_parameters()} == identities
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_network_is_left_as_it_was_after_an_error():
    model = small_network().train()
    with pytest.raises(ValueError, match="does not take an input of size"):
        blnet.profile(model, (1, 5, 64, 64))
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.device.type == "cpu" for p in model.parameters())


def test_half_precision_network():
    model = small_network()
    expected = blnet.profile(model)
    assert blnet.profile(model.to(torch.bfloat16)) == expected


def test_takes_under_a_second():
    model = registry.build("bl_resnet50")
    blnet.profile(model, (1, 3, 64, 64))  # what Python compiles and imports once
    # CPU time: other work on the machine is not the profile's fault.
    begin = time.process_time()
    blnet.profile(model)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize(
    "size", [(), (1, 3, 0, 8), (1, 3, -8, 8), (1, 3, 8.0, 8), (1, 3, "8", 8), (1, 3, None, 8)]
)
def test_sizes_that_are_none(size):
    with pytest.raises(ValueError, match="input_size must be positive whole numbers, got"):
        blnet.profile(small_network(), size)


@pytest.mark.parametrize("size", [(1, 4, 32, 32), (3, 32, 32), (1, 3, 32), (7,), (1, 3, 4, 4, 4)])
def test_sizes_that_do_not_fit(size):
    with pytest.raises(ValueError, match=r"does not take an input of size \(") as caught:
        blnet.profile(small_network(), size)
    assert "\n" not in str(caught.value)


def test_table_has_a_line_for_each_layer_and_the_totals():
    counted = blnet.profile(small_network(), (1, 3, 64, 64))
    head, *rows, total = str(counted).splitlines()
    assert len(rows) == len(counted.layers)
    assert head.split()[:4] == ["layer", "kind", "parameters", "MACs"]
    assert total.split() == [
        "total",
        f"{counted.parameters:,}",
        f"{counted.macs:,}",
        f"{counted.activations:,}",
    ]
    assert rows[0].split()[-1] == "1x16x32x32"


def test_a_shared_layer_is_left_as_it_is():
    norm = nn.BatchNorm2d(8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), norm)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counted = blnet.profile(model, (1, 3, 16, 16))
    assert counted.parameters == sum(p.numel() for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrong", ["resnet50", None])
def test_something_else_than_a_module_is_refused(wrong):
    with pytest.raises(ValueError, match="model must be a"):
        blnet.profile(wrong)


@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_on_meta_has_the_shape_that_pytorch_gives(affine: bool) -> None:
    norm, x = nn.BatchNorm2d(6, affine=affine), torch.randn(2, 6, 3, 5)
    out = run_on_meta(meta_twin(norm), x.shape)
    assert (out.shape, out.dtype, out.device.type) == (x.shape, x.dtype, "meta")
    with pytest.raises(RuntimeError):
        run_on_meta(meta_twin(norm), (2, 7, 3, 5))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: torch.tensor_split(x, torch.tensor([2, 4]), 1)[1],
        lambda x: x.view(x.shape[0], torch.tensor(2), -1)[:, 0],
        lambda x: x.repeat_interleave(torch.tensor([1] * x.shape[1]), dim=1),
        lambda x: torch.narrow(x, 1, torch.tensor(1), 4),
    ],
)
def test_values_of_a_networks_own_tensors_are_read(forward):
    """What PyTorch reads from the CPU, such as where to split, stays there."""

    class Reading(nn.Module):
        def forward(self, x):
            return forward(x)

    x = torch.randn(3, 8)
    width = Reading()(x).shape[1]
    model = nn.Sequential(Reading(), nn.Linear(width, 5))
    assert blnet.profile(model, (3, 8)).macs == 3 * width * 5
