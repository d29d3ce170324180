"""Checkpoints: safetensors weights with what rebuilds the network as JSON in the file's header.

Three kinds of network are told apart. A `BigLittleNet` is rebuilt from its configuration, a
converted network (`blnet.convert`) from its plan, and any other module is filled by the caller:
`load(path, model=...)`. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, fx, nn

from blnet import registry
from blnet.files import StrPath, reason, written_aside
from blnet.keys import misfits, shapes_of
from blnet.network import BigLittleConfig, BigLittleNet

FORMAT = "blnet-checkpoint"
VERSION = 1
# Options of other libraries' networks that fetch or read weights, which a file of weights replaces.
UNREAD = frozenset({"weights", "pretrained", "checkpoint_path"})
# One header entry holds all of our JSON: the order of several would differ from run to run.
_ENTRY = "blnet"
_PICKLED = (".pth", ".pt")
_PLAN_FIELDS = ("source", "source_options", "alpha", "beta", "branches")


def save(model: nn.Module, path: StrPath, **extra: Any) -> None:
    """Write a network's weights, and what rebuilds it, to a safetensors file.

    The file is written aside in the same folder, flushed to the disk and renamed, so that `path`
    holds the old file or the new one, whole, whatever happens in between. Weights keep their dtype
    and are stored contiguous; tied weights are stored once.

    Args:
        model: a `BigLittleNet`, a network made by `blnet.convert`, or any other module, of which
            only the weights are kept. So it is with one of the former whose layers were exchanged;
            to see that, a converted one of torchvision's or timm's is built again, without weights.
        path: the file to write, FILE.safetensors say.
        extra: anything JSON can hold, for the header (`read_header(path)["extra"]`).

    Raises:
        ValueError: if a weight has no data or no safetensors form, `extra` is not JSON, or `path`
            ends as files do that PyTorch pickles.
        OSError: if the file cannot be written; it says why and what to do.
    """
    if Path(path).suffix in _PICKLED:
        raise ValueError(
            f"{path} would be read as a pickled file, and safetensors is written; name it "
            f"{Path(path).with_suffix('.safetensors').name}"
        )
    with written_aside(path) as aside:
        tensors, ties = _storable(model)
        header = {"format": FORMAT, "version": VERSION, **_describe(model), "ties": ties}
        try:
            text = json.dumps({**header, "extra": extra}, sort_keys=True)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be written: its header must be JSON ({error}); give plain "
                "numbers, strings, lists and dicts"
            ) from error
        aside.write_bytes(safetensors.torch.save(tensors, {_ENTRY: text}))


def load(path: StrPath, model: nn.Module | None = None, *, trust_source: bool = False) -> nn.Module:
    """Return the network of a file that `save` wrote, on the CPU, in evaluation mode.

    Args:
        path: the file.
        model: the network to fill, of the same shape as the saved one; needed where the file holds
            weights only. It is changed only if everything fits, and takes on the file's dtypes.
        trust_source: whether a converted network may be rebuilt by importing the module and calling
            the function that the file names ("package.module:function"). Both run code.

    Raises:
        ValueError: if the file is not a whole checkpoint of ours, is of a newer version, cannot be
            rebuilt without `model`, or its keys or shapes do not fit (the error lists them).
        OSError: if the file cannot be read.
    """
    header, weights = _read(path)
    if model is None:
        model = _rebuild(path, header, trust_source)
    _fill(path, model, weights)
    return model.eval()


def read_header(path: StrPath) -> dict[str, Any]:
    """Return a checkpoint's header: format, version, kind, config or plan, ties and extra.

    Raises:
        ValueError: if the file is not a whole checkpoint of ours, or is of a newer version.
        OSError: if the file cannot be read.
    """
    with _opened(path) as file:
        return _parse_header(path, file.metadata())


def _storable(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the state as tensors that share no memory, and the keys tied to each of those."""
    tensors: dict[str, Tensor] = {}
    ties: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for key, value in model.state_dict().items():
        _check_storable(key, value)
        pointer = value.untyped_storage().data_ptr()
        place = (pointer, value.dtype, value.shape, value.stride(), value.storage_offset())
        if pointer and place in first:
            ties[key] = first[place]
            continue
        first[place] = key
        tensor = value.detach().cpu().contiguous()
        # Two views of one storage that are not the same view are stored as two tensors.
        pointer = tensor.untyped_storage().data_ptr()
        tensors[key] = tensor.clone() if pointer in storages else tensor
        storages.add(pointer)
    return tensors, ties


def _check_storable(key: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{key} is a {type(value).__name__}; a checkpoint holds tensors only, so keep it "
            "out of the state dict"
        )
    if value.is_meta:
        raise ValueError(f"{key} is on the meta device and has no values; give the network weights")
    unknown = value.dtype in (torch.complex128, torch.complex32) or value.is_quantized
    if value.layout != torch.strided or unknown:
        raise ValueError(
            f"{key} is a {value.layout} tensor of {value.dtype}, which safetensors cannot hold; "
            "make it a dense tensor of a common dtype first"
        )


def _describe(model: nn.Module) -> dict[str, Any]:
    """Return the kind of a network and what rebuilds it."""
    if isinstance(model, BigLittleNet) and model.as_configured:
        with torch.device("meta"):
            rebuilt = BigLittleNet(model.config)
        # A network whose classifier was exchanged, say, is no longer what its configuration says.
        if shapes_of(rebuilt) == shapes_of(model) and _has_layers_of(model, rebuilt):
            return {"kind": "big-little", "config": dataclasses.asdict(model.config)}
    # One of ours with one branch can be converted like any other plain network.
    plan = getattr(model, "plan", None)
    to_dict = None if isinstance(plan, nn.Module) else getattr(plan, "to_dict", None)
    if to_dict is None or not _is_as_converted(model, to_dict()):
        return {"kind": "weights"}
    return {"kind": "converted", "plan": to_dict()}


def _is_as_converted(model: nn.Module, plan: dict[str, Any]) -> bool:
    """Return whether a converted network has the layers that its plan gives it, as far as is known.

    What cannot be built again, or only by code that is not ours to call at every checkpoint of a
    run, is for `load` to refuse.
    """
    if plan.get("source") is None:
        return True
    try:
        rebuilt = _reconverted_on_meta(json.dumps(plan))
    except Exception:  # a foreign source is refused; others may raise anything on the meta device
        return True
    return shapes_of(rebuilt) == shapes_of(model) and _has_layers_of(model, rebuilt)


@functools.lru_cache(maxsize=1)  # a run saves one network time and again
def _reconverted_on_meta(plan: str) -> nn.Module:
    """Return the network of a plan, given as JSON, without weights; to be looked at only."""
    with torch.device("meta"):
        return _reconvert("the network", json.loads(plan), trust_source=False)


def _has_layers_of(model: nn.Module, rebuilt: nn.Module) -> bool:
    """Return whether all layers of a network are what another one has in their places.

    A class derived from the other's will do, as fused layers have, and SyncBatchNorm for BatchNorm;
    dropout, momentum and whether a layer works in place change no answer.
    """
    own, others = (
        {name: layer for name, layer in one.named_modules() if not isinstance(layer, nn.Dropout)}
        for one in (model, rebuilt)
    )
    return own.keys() == others.keys() and all(
        _is_of_kind(layer, others[name]) and _settings_of(layer) == _settings_of(others[name])
        for name, layer in own.items()
    )


def _is_of_kind(layer: nn.Module, other: nn.Module) -> bool:
    if isinstance(layer, fx.GraphModule) and isinstance(other, fx.GraphModule):
        return layer.code == other.code  # each has a class of its own
    norms = (isinstance(one, nn.modules.batchnorm._BatchNorm) for one in (layer, other))
    return isinstance(layer, type(other)) or all(norms)


def _settings_of(layer: nn.Module) -> str:
    return re.sub(r"(momentum|inplace)=[^,]*", "", layer.extra_repr())


@contextlib.contextmanager
def _opened(path: StrPath) -> Iterator[Any]:
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"{path} does not exist; check the path of the checkpoint")
    if not file.is_file():
        raise ValueError(f"{path} is not a file; give the checkpoint file itself")
    file.open("rb").close()  # one that may not be read safetensors takes for missing
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({reason(error)}); it is cut short or of "
            "another kind: blnet.load_official reads the published .pth files"
        ) from error


def _read(path: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with _opened(path) as file:
        header = _parse_header(path, file.metadata())
        # Copies: the tensors of the file are mapped from the disk, unaligned and bound to it.
        weights = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    for key, name in header["ties"].items():
        if name not in weights or key in weights:
            raise ValueError(f"{path} is damaged: its header ties {key} to {name}; save it anew")
        weights[key] = weights[name].clone()
    return header, weights


def _parse_header(path: StrPath, metadata: dict[str, str] | None) -> dict[str, Any]:
    foreign = (
        f"{path} is a safetensors file but no checkpoint that blnet.save wrote; fill a network "
        "with safetensors.torch.load_model, then save that"
    )
    try:
        header = json.loads((metadata or {})[_ENTRY])
    except (KeyError, json.JSONDecodeError):
        raise ValueError(foreign) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(foreign)
    version = header.get("version")
    if isinstance(version, int) and version > VERSION:
        raise ValueError(
            f"{path} has format version {version} and this blnet reads up to {VERSION}; "
            "install a newer blnet"
        )
    ties = header.get("ties")
    whole = isinstance(ties, dict) and all(isinstance(name, str) for name in ties.values())
    if version != VERSION or not whole or not isinstance(header.get("kind"), str):
        raise ValueError(f"{path} has a damaged header; save the network anew")
    return header


def _rebuild(path: StrPath, header: dict[str, Any], trust_source: bool) -> nn.Module:
    kind = header["kind"]
    if kind == "weights":
        raise ValueError(
            f"{path} holds weights only; give the network they belong to: blnet.load(path, model)"
        )
    about = header.get({"big-little": "config", "converted": "plan"}.get(kind, ""))
    if not isinstance(about, dict):
        raise ValueError(f"{path} has a damaged header of kind {kind!r}; save the network anew")
    if kind == "converted":
        return _reconvert(path, about, trust_source)
    try:
        with torch.device("meta"):
            return BigLittleNet(BigLittleConfig.from_dict(about))
    except ValueError as error:
        raise ValueError(f"{path} describes no network: {error}") from error


def _reconvert(path: StrPath, plan: dict[str, Any], trust_source: bool) -> nn.Module:
    missing = [name for name in _PLAN_FIELDS if name not in plan]
    if missing or not isinstance(plan["source_options"], dict):
        raise ValueError(f"{path} has a damaged plan; save the network anew")
    source = plan["source"]
    if not isinstance(source, str):
        raise ValueError(
            f"{path} was converted from a network without a name; convert that network again and "
            "give it: blnet.load(path, model)"
        )
    foreign = registry.is_own_code(source)
    if foreign and not trust_source:
        raise ValueError(
            f"{path} was converted from {source}, and rebuilding it would import and call that; "
            "pass trust_source=True if you trust the file, or the converted network as model"
        )
    # The file's weights replace those, and nothing may be downloaded that nobody asked for.
    unread = UNREAD if not foreign else frozenset()
    options = {name: value for name, value in plan["source_options"].items() if name not in unread}
    from blnet.conversion import convert

    try:
        # The caller's random state must not depend on whether a file was read.
        with torch.random.fork_rng(devices=[]):
            built = registry.build(source, **options)
            settings = {name: plan[name] for name in ("alpha", "beta", "branches")}
            size = plan.get("input_size") or None
            converted: Any = convert(built, **settings, input_size=size)
    except ValueError as error:
        raise ValueError(f"{path} cannot be rebuilt from {source}: {error}") from error
    # So that the network can be saved and rebuilt again.
    converted.plan = dataclasses.replace(converted.plan, source=source, source_options=options)
    rebuilt: nn.Module = converted
    return rebuilt


def _fill(path: StrPath, model: nn.Module, weights: dict[str, Tensor]) -> None:
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    told = misfits(own, weights)
    if told:
        raise ValueError(f"{path} does not fit the network; {told}")
    made: dict[int, tuple[str, Tensor]] = {}
    ready: dict[str, Tensor] = {}
    for key, old in own.items():
        value = weights[key]
        if id(old) in made:
            # Weights that the network ties stay one parameter.
            name, ready[key] = made[id(old)]
            if not torch.equal(_as_bytes(ready[key]), _as_bytes(value)):
                raise ValueError(f"{path} has different {name} and {key}, which the network ties")
            continue
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, requires_grad=old.requires_grad)
        ready[key] = value
        made[id(old)] = key, value
    model.load_state_dict(ready, assign=True)
    if not any(buffer.is_meta for buffer in model.buffers()):
        model.cpu()  # buffers that are not part of the state


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return the bit pattern, by which NaN equals itself."""
    return tensor.detach().reshape(-1).view(torch.uint8)
