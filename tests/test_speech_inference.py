"""Trained speech networks: what their checkpoints say, and what is wrong with others."""

import json
import math

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import blnet
from blnet import registry
from blnet.cli import main
from blnet.network import BigLittleConfig, BigLittleNet
from blnet.speech.config import DataConfig, FeatureConfig
from blnet.speech.features import LogMel
from blnet.speech.inference import configuration, load_trained
from helpers import tones

COMMANDS = {
    "predict": ("predict", "speech", "{file}", "--checkpoint", "{net}"),
    "transcribe": ("transcribe", "{file}", "--checkpoint", "{net}"),
    "evaluate": ("evaluate", "speech", "{net}"),
    "align": ("align", "{net}", "--output", "{out}"),
}
OF = {"predict": "keyword", "transcribe": "ctc", "evaluate": "ctc", "align": "ctc"}


@pytest.fixture
def refused(tmp_path, capsys):
    """Give a function that runs a command on a checkpoint and returns the one line it says."""
    tones.write(tmp_path / "some.wav", tones.spoken("ab"))

    def run(command, net, *more):
        places = {"file": tmp_path / "some.wav", "net": net, "out": tmp_path / "labels"}
        words = [word.format(**places) for word in COMMANDS[command]]
        assert main([*words, *map(str, more)]) == 2
        found = capsys.readouterr()
        assert found.out == ""
        line = found.err.splitlines()[-1]
        assert "Traceback" not in found.err
        name = " ".join(words[:2]) if words[1] == "speech" else command
        start = f"blnet {name}: error: "
        assert line.startswith(start)
        return line.removeprefix(start)

    return run


def reheaded(path, change):
    """Rewrite a checkpoint with its header changed."""
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["blnet"])
    change(header["extra"])
    weights = safetensors.torch.load_file(path)
    safetensors.torch.save_file(weights, path, {"blnet": json.dumps(header)})
    return path


# What is known of a network ---------------------------------------------------------------------


@pytest.mark.parametrize("head", ["keyword", "ctc", "frame"])
def test_a_checkpoint_tells_all_that_is_needed(tmp_path, head):
    found = load_trained(tones.save(tmp_path / "net.safetensors", head))
    assert found.head == head
    assert found.classes == (tones.WORDS if head == "keyword" else ())
    assert found.alphabet == tones.ALPHABET
    assert found.features.as_dict() == LogMel(tones.FEATURES, tones.RATE).as_dict()
    assert found.data.name == "manifest"
    assert found.title == "bl_resnet22 (alpha 2, beta 2, width 0.125)"
    assert not found.model.training
    assert found.step == found.features.hop_samples


def test_answers_are_those_of_the_network_whatever_the_batch(tmp_path):
    found = load_trained(tones.save(tmp_path / "net.safetensors", "frame"))
    recordings = [torch.tensor(tones.spoken(text)).float() for text in ("abc", "b", "ca b")]
    together, lengths = found(recordings)
    for recording, logits, length in zip(recordings, together, lengths.tolist(), strict=True):
        maps, frames = found.features(recording[None], torch.tensor([len(recording)]))
        with torch.no_grad():
            alone = tones.trained("frame")(maps, frames)[0]
        assert length == len(alone)
        torch.testing.assert_close(logits[:length], alone, rtol=1e-4, atol=1e-4)


def test_the_cost_is_that_of_a_second(tmp_path):
    found = load_trained(tones.save(tmp_path / "net.safetensors", "frame"))
    model = tones.trained("frame")
    assert found.cost().parameters == sum(p.numel() for p in model.parameters())
    # The last layer: 24 channels by 2 bands to 5 classes, 100 times a second.
    (last,) = (layer for layer in found.cost().layers if layer.name == "fc")
    assert last.macs == 24 * 2 * 5 * 100


def test_a_configuration_is_the_networks_own(tmp_path):
    model = tones.untrained("frame", time_reduction=2)
    found = load_trained(tones.save(tmp_path / "net.safetensors", "frame", model))
    data = DataConfig(name="fsdd", path="x")
    config = configuration(found, data, batch_size=7)
    assert (config.task, config.data, config.batch_size) == ("frame", data, 7)
    assert config.features == tones.FEATURES
    assert config.model.time_reduction == 2
    assert configuration(found, data, task="ctc").task == "ctc"


def test_a_run_gives_its_best_network(tmp_path):
    tones.save(tmp_path / "best.safetensors", "ctc")
    found = load_trained(tmp_path)
    assert found.source == str(tmp_path)
    assert found.head == "ctc"


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_checkpoint(refused, tmp_path, command):
    net = tmp_path / "none.safetensors"
    assert refused(command, net) == (
        f"checkpoint {net} does not exist; name a .safetensors file or a run's folder "
        "('blnet train speech' makes one)"
    )


@pytest.mark.parametrize("command", ["predict", "transcribe"])
def test_no_checkpoint_at_all(command, tmp_path, capsys):
    words = [*COMMANDS[command][: 1 + (command == "predict")], str(tmp_path / "some.wav")]
    assert main(words) == 2
    assert "--checkpoint is missing; name a trained network" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_network_for_images(refused, tmp_path, command):
    net = tmp_path / "net.safetensors"
    blnet.save(BigLittleNet(BigLittleConfig(block="basic", depths=(1, 1), widths=(8, 16))), net)
    assert refused(command, net) == (
        f"checkpoint {net} was not trained on speech; use 'blnet evaluate vision' or "
        "'blnet predict vision'"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_network_for_images_whose_weights_alone_are_kept(refused, tmp_path, command):
    net = tmp_path / "net.safetensors"
    blnet.save(torch.nn.Linear(2, 2), net, task="vision", network={"name": "resnet18"})
    assert refused(command, net) == (
        f"checkpoint {net} was not trained on speech; use 'blnet evaluate vision' or "
        "'blnet predict vision'"
    )


@pytest.mark.parametrize(
    ("command", "head", "use"),
    [
        ("predict", "ctc", "use 'blnet transcribe'"),
        ("predict", "frame", "use 'blnet transcribe'"),
        ("transcribe", "keyword", "use 'blnet predict speech'"),
        ("align", "keyword", "use 'blnet predict speech'"),
        ("align", "frame", "use 'blnet transcribe'"),
    ],
)
def test_a_network_of_another_task(refused, tmp_path, command, head, use):
    net = tones.save(tmp_path / "net.safetensors", head, tones.untrained(head))
    said = refused(command, net)
    assert said.startswith(f"checkpoint {net} was trained for --task {head}, and this takes ")
    assert said.endswith(use)


@pytest.mark.parametrize("command", COMMANDS)
def test_files_that_are_no_checkpoints(refused, tmp_path, command):
    (tmp_path / "run").mkdir()
    assert "is a folder without best.safetensors" in refused(command, tmp_path / "run")
    net = tones.save(tmp_path / "net.safetensors", OF[command], tones.untrained(OF[command]))
    whole = net.read_bytes()
    for bad in (b"", b"not a checkpoint\n" * 9, whole[: len(whole) // 2]):
        net.write_bytes(bad)
        assert str(net) in refused(command, net)


def _damages():
    """Name ways in which a header can be damaged, and what is said of each."""
    return {
        "no features": (lambda e: e.pop("features"), "it lacks features"),
        "nothing": (lambda e: [e.pop(k) for k in ("alphabet", "data")], "lacks alphabet and data"),
        "features' type": (lambda e: e.update(features=[1]), "must be a table"),
        "a feature": (lambda e: e["features"].update(bins="many"), "features.bins"),
        "infinite": (lambda e: e["features"].update(window=math.inf), "features.window"),
        "data's type": (lambda e: e.update(data=[]), ""),
        "a data setting": (lambda e: e["data"].update(max_seconds="long"), ""),
        "alphabet": (lambda e: e.update(alphabet=5), ""),
        "letters": (lambda e: e.update(alphabet="ab"), "3 classes in one place and of 5 in anoth"),
        "letters twice": (lambda e: e.update(alphabet="aab "), "each of them once"),
        "bands": (lambda e: e["features"].update(bins=20), "20 bands in one place and of 16 in an"),
        "channels": (lambda e: e["features"].update(deltas=True), "of 3 channels in one place"),
        "rate": (lambda e: e["data"].update(sample_rate=16000), "tells of 16000 Hz in one place"),
        "classes": (lambda e: e.update(classes=7), ""),
    }


@pytest.mark.parametrize("damage", _damages())
def test_damaged_headers(refused, tmp_path, damage):
    change, said = _damages()[damage]
    net = tones.save(tmp_path / "net.safetensors", "ctc", tones.untrained("ctc"))
    found = refused("transcribe", reheaded(net, change))
    assert found.startswith(f"checkpoint {net} cannot be used: its header is damaged (")
    assert found.endswith("); train it anew")
    assert said in found


@pytest.mark.parametrize(
    "network",
    [None, 5, {"name": "bl_resnet22", "options": {"x": 1}}, {"name": "os:system"}, {"name": "x"}],
)
def test_headers_that_build_no_network(refused, tmp_path, network):
    net = tones.save(tmp_path / "net.safetensors", "ctc", tones.untrained("ctc"))
    said = refused("transcribe", reheaded(net, lambda extra: extra.update(network=network)))
    assert str(net) in said


def test_a_header_without_options_is_that_of_the_network_as_it_comes(tmp_path):
    features = LogMel(FeatureConfig(), 16000).as_dict()
    header = {"network": {"name": "bl_resnet22"}, "classes": list("0123456789"),
              "features": features, "data": {}}  # fmt: skip
    net = tones.save(tmp_path / "n.safetensors", "keyword", registry.build("bl_resnet22"), **header)
    assert load_trained(net).title == "bl_resnet22 (alpha 4, beta 2)"


@pytest.mark.parametrize("command", COMMANDS)
def test_weights_that_are_no_numbers(refused, tmp_path, command):
    model = tones.untrained(OF[command])
    nn.init.constant_(model.fc.bias, math.nan)
    net = tones.save(tmp_path / "net.safetensors", OF[command], model)
    tones.write(tmp_path / "more.wav", tones.spoken("ab"))
    (tmp_path / "list.tsv").write_text("audio\ttext\nsome.wav\tab\nmore.wav\tab\n")
    data = ("--data-path", tmp_path / "list.tsv")
    more = data if command in ("evaluate", "align") else ()
    assert refused(command, net, *more) == (
        f"checkpoint {net} gives outputs that are not finite numbers; train it anew"
    )
    assert not (tmp_path / "labels" / "labels.safetensors").exists()


def test_too_little_memory_is_told(tmp_path, monkeypatch):
    found = load_trained(tones.save(tmp_path / "net.safetensors", "frame"))

    def starve(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(found.model, "forward_features", starve)
    with pytest.raises(
        ValueError, match=r"^memory ran out with 3 s of sound at once; take less at"
    ):
        found([torch.zeros(3 * tones.RATE + 200)])
