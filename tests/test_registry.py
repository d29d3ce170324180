"""Networks by name."""

import sys
import types

import pytest
import torchvision
from torch import nn

import blnet.vision.models
from blnet import registry
from helpers.networks import on_meta


def fails(error=None):
    raise error or RuntimeError("boom\n\x1b[1mand more\x1b[0m")


class SilentError(Exception):
    """An error whose text cannot be had."""

    def __str__(self):
        raise KeyError("no text")


@pytest.fixture
def own_module(monkeypatch):
    """Put a user's module with a few functions in place of an import."""
    module = types.ModuleType("my_networks")
    module.tiny = lambda width=4: nn.Linear(width, 2)
    module.not_a_module = lambda: 3
    module.constant = 7
    module.fails = fails
    monkeypatch.setitem(sys.modules, "my_networks", module)
    return module


@pytest.fixture
def empty_slot(monkeypatch):
    """Undo what a test registers."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))


def test_names_split_into_big_little_and_plain():
    both, ours, plain = registry.names(), registry.names(True), registry.names(False)
    assert sorted(both) == sorted([*ours, *plain])
    assert all(registry.is_big_little(name) for name in ours)
    assert not any(registry.is_big_little(name) for name in plain)
    # Other tests may have registered the networks for speech.
    assert [n for n in plain if n != "resnet22"] == list(blnet.vision.models.PLAIN_MODELS)
    assert not registry.is_big_little("no such network")
    assert not registry.is_big_little("torchvision:resnet50")


def test_options_reach_the_network():
    model = on_meta("bl_resnet18", alpha=4, beta=2, num_classes=7, in_channels=1)
    assert (model.config.alpha, model.config.beta) == (4, 2)
    assert model.fc.out_features == 7
    assert model.stem.conv1.in_channels == 1
    assert type(on_meta("resnet18", num_classes=7)) is torchvision.models.ResNet


@pytest.mark.parametrize(
    ("name", "near"),
    [("bl_resnet5", "bl_resnet50"), ("resnet-50", "resnet50"), ("bl_seresnext50", "bl_seresnext")],
)
def test_unknown_name_suggests_near_ones(name, near):
    with pytest.raises(ValueError, match=f"no network is named '{name}'; near it are .*{near}"):
        registry.build(name)


def test_unknown_name_near_to_none_lists_all():
    with pytest.raises(ValueError, match="no network is named 'xyz'") as caught:
        registry.build("xyz")
    assert all(name in str(caught.value) for name in registry.names())


@pytest.mark.parametrize("name", ["bl_resnet50", "resnet50"])
def test_unknown_option_lists_the_known_ones(name):
    with pytest.raises(
        ValueError, match=f"{name} takes no option alfa, gamma; its options are .*num_classes"
    ):
        registry.build(name, alfa=2, num_classes=3, gamma=1)


def test_plain_network_has_no_alpha():
    with pytest.raises(ValueError, match="resnet50 takes no option alpha"):
        registry.build("resnet50", alpha=2)


def test_bad_option_value():
    with pytest.raises(ValueError, match="alpha must be a whole number"):
        registry.build("bl_resnet50", alpha="2")


def test_name_is_registered_once(empty_slot):
    registry.register("mine", lambda width=3: nn.Linear(width, 2), big_little=False)
    assert registry.build("mine", width=5).in_features == 5
    with pytest.raises(ValueError, match="'mine' is registered already"):
        registry.register("mine", nn.Identity, big_little=False)


def test_torchvision():
    model = on_meta("torchvision:resnet18", num_classes=7)
    assert type(model) is torchvision.models.ResNet
    assert model.fc.out_features == 7


def test_timm():
    timm = pytest.importorskip("timm")
    model = on_meta("timm:resnet50d", num_classes=7)
    assert type(model) is timm.models.ResNet
    assert model.num_classes == 7


def test_user_function(own_module):
    assert registry.build("my_networks:tiny", width=6).in_features == 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision:resnet51", {}, "torchvision has no classification model 'resnet51'"),
        ("timm:resnet51", {}, "timm has no model 'resnet51'"),
        ("torchvision:resnet18", {"alpha": 2}, "torchvision:resnet18 cannot be built with"),
        ("my_networks:tiny", {"depth": 2}, "my_networks:tiny cannot be built with"),
        ("my_networks:big", {}, "module 'my_networks' has no function 'big'"),
        ("my_networks:constant", {}, "module 'my_networks' has no function 'constant'"),
        ("my_networks:", {}, "module 'my_networks' has no function ''"),
        ("my_networks:not_a_module", {}, "must return a torch.nn.Module, it returned int"),
        ("my_networks:fails", {}, "my_networks:fails cannot be built: RuntimeError: boom and more"),
        ("my_networks:fails", {"error": KeyError("a")}, "built with .*: KeyError: 'a'"),
        ("my_networks:fails", {"error": MemoryError()}, "it does not fit into memory; choose a"),
        ("my_networks:fails", {"error": SystemExit()}, "built with .*: SystemExit"),
        ("my_networks:fails", {"error": SilentError()}, "built with .*: SilentError"),
        ("no_such_package.models:net", {}, "'no_such_package.models' cannot be imported"),
        (":resnet18", {}, "cannot be imported"),
        (".models:resnet18", {}, "cannot be imported"),
    ],
)
def test_bad_foreign_names(own_module, name, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        registry.build(name, **options)
    assert "\n" not in str(caught.value)


def test_a_registered_builder_that_fails(empty_slot):
    registry.register("mine", fails, big_little=False)
    with pytest.raises(ValueError, match="mine cannot be built: RuntimeError: boom and more"):
        registry.build("mine")
    with pytest.raises(KeyboardInterrupt):
        registry.build("mine", error=KeyboardInterrupt())


def test_a_torchvision_made_for_another_pytorch(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(registry.importlib, "import_module", broken)
    with pytest.raises(ValueError, match=r"cannot be imported \(operator .*pip install --upgrade"):
        registry.build("torchvision:resnet18")
    with pytest.raises(ValueError, match="need torchvision: pip install"):
        registry.build("xyz")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_missing_library_says_what_to_install(monkeypatch, library):
    missing = "torchvision.models" if library == "torchvision" else "timm"
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ValueError, match=r"is not installed; .*pip install 'blnet\[vision\]'"):
        registry.build(f"{library}:resnet18")


def test_a_module_of_the_working_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "my_own_nets.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Linear(3, 4)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert registry.build("my_own_nets:make").out_features == 4
    assert sys.path == before
