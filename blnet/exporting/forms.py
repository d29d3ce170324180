"""What an exported network takes and gives: images and logits, or recordings and their lengths."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blnet.files import reason
from blnet.fusing import unfuse
from blnet.kernels import use_backend

IMAGE_SIZE = 224  # pixels a side of the usual example
FRAMES = 300  # three seconds of sound, a frame every 10 ms
# Free axes that do not go down to 1: for fewer frames, 80 ms, a network may answer with one only,
# and torch.export would have to know whether it does.
LEAST = {"frames": 8}
_BATCH = 2  # an exporter takes a batch of 1 for a constant
# A trace by example cannot tell a map of one pixel from half of it; in these all maps have more.
_LEAST_TRACED = 64
_OTHER_SIZE = (33, 47)


@dataclass(frozen=True)
class Form:
    """A network as it is exported.

    Attributes:
        module: the network, float32, on the CPU, in evaluation mode, a copy of the user's.
        shape: shape of the first input's example.
        inputs: names of the inputs.
        outputs: names of the outputs.
        free: axes of each input that may have any size, with their names.
    """

    module: nn.Module
    shape: tuple[int, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    free: tuple[Mapping[int, str], ...] = field(default_factory=tuple)

    def drawn(self, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
        """Return random inputs, the first of this shape; recordings get shorter one by one."""
        with torch.device("cpu"):  # whatever the user's default is
            drawn = torch.Generator().manual_seed(seed)
            first = torch.randn(shape, generator=drawn, dtype=torch.float32)
            if len(self.inputs) == 1:
                return (first,)
            frames = shape[-1]
            return first, torch.tensor([max(1, frames - i * frames // 3) for i in range(shape[0])])

    def answer(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Return what the network itself gives."""
        with torch.no_grad(), use_backend("torch"):
            found = self.module(*(x.clone() for x in inputs))  # its code may change them
        return found if isinstance(found, tuple) else (found,)

    def is_taken(self, shape: tuple[int, ...], least: Mapping[str, int]) -> bool:
        """Return whether a shape of the first input has the least sizes of free axes, by name."""
        return all(shape[axis] >= least.get(name, 1) for axis, name in self.free[0].items())

    def traced_shape(self, dynamic: bool, least: int = 1) -> tuple[int, ...]:
        """Return the shape to trace with; where sizes are free, a batch that is no constant."""
        if not dynamic:
            return self.shape
        free = self.free[0]
        sizes = (max(n, least) if i in free else n for i, n in enumerate(self.shape))
        _, *rest = sizes
        return (max(_BATCH, self.shape[0]), *rest)

    def traced_shape_by_example(self, dynamic: bool) -> tuple[int, ...]:
        """Return the shape for a tracer that sees numbers only."""
        return self.traced_shape(dynamic, _LEAST_TRACED)

    def probes(self, dynamic: bool) -> Iterator[tuple[int, ...]]:
        """Yield shapes to check a file at: the example's, then odd ones and other batches."""
        yield self.shape
        if not dynamic:
            return
        axes = [axis for axis in self.free[0] if axis > 0]
        sides = [self.shape[axis] for axis in axes]
        spread = (22 / 25, 28 / 25)  # of 224: 197 and 251
        odd = [int(n * share) | 1 for n, share in zip(sides, itertools.cycle(spread), strict=False)]
        for batch, sizes in ((3, [n + 1 for n in sides]), (1, odd), (2, _OTHER_SIZE[: len(axes)])):
            shape = [batch, *self.shape[1:]]
            for axis, size in zip(axes, sizes, strict=True):
                shape[axis] = size
            yield tuple(shape)


def prepared(model: nn.Module, example: Tensor | None = None, lengths: bool = True) -> Form:
    """Return a network as it is exported: a copy of it for inference, and what it takes.

    Args:
        model: a network from one tensor to one tensor, or one for recordings, from maps
            (N, channels, bins, frames) and their lengths (N,).
        example: its first input, of which only the shape counts; None for 224 x 224 pixels, or
            300 frames of sound.
        lengths: whether a network for recordings takes their lengths; else they fill the map.

    Raises:
        ValueError: if the network takes or gives anything else, or does not run at that size.
    """
    _check_given(model, example)
    kind = type(model).__name__
    speech = _takes_recordings(model)
    if not speech:
        _check_one_input(model)
    with torch.random.fork_rng(devices=[]):
        module = unfuse(model).cpu().float().eval().requires_grad_(False)
    shape = usual_shape(model) if example is None else tuple(example.shape)
    form = _recordings(module, shape) if speech and lengths else _images(module, shape)
    try:
        given = form.answer(*form.drawn(form.shape))
    except Exception as error:  # whatever the user's network raises
        raise ValueError(
            f"{kind} does not run on an input of shape {shape} ({reason(error)}); give an example "
            "that it takes: another number of channels, or a larger size"
        ) from error
    if not all(isinstance(one, Tensor) for one in given) or len(given) != len(form.outputs):
        raise ValueError(
            f"{kind} gives {_told(given)}, and only networks that give one tensor are exported; "
            "wrap it in a module that returns one"
        )
    return form


def _told(given: tuple[Any, ...]) -> str:
    return f"a {type(given[0]).__name__}" if len(given) == 1 else f"{len(given)} values"


def _check_given(model: Any, example: Any) -> None:
    """Raise a ValueError if the network or its example is none, or has no values."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"model must be a torch.nn.Module, and not of TorchScript, got {type(model).__name__}; "
            "give the network itself"
        )
    valueless = (name for name, value in model.state_dict(keep_vars=True).items()
                 if isinstance(value, Tensor) and (is_lazy(value) or value.is_meta))  # fmt: skip
    if name := next(valueless, None):
        raise ValueError(
            f"{name} of {type(model).__name__} has no values yet; give the network weights"
        )
    if example is not None and not (isinstance(example, Tensor) and example.ndim and len(example)):
        got = f"one of shape {tuple(example.shape)}" if isinstance(example, Tensor) else (
            type(example).__name__)  # fmt: skip
        raise ValueError(
            f"example_input must be a tensor of one input or more, got {got}; "
            f"give torch.empty(1, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), say"
        )


def _check_one_input(model: nn.Module) -> None:
    """Raise a ValueError if a network needs more than one argument."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    needed = [one.name for one in parameters if one.default is one.empty
              and one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    if len(needed) > 1:
        raise ValueError(
            f"{type(model).__name__} needs {len(needed)} inputs ({', '.join(needed)}), and only "
            "networks of one tensor are exported; wrap it in a module that takes one"
        )


def usual_shape(model: nn.Module) -> tuple[int, ...]:
    """Return the shape of the usual example: 224 x 224 pixels, or 300 frames of sound."""
    if _takes_recordings(model):
        config: Any = model.config
        return 1, config.in_channels, config.bins, FRAMES
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 1, first.in_channels if first else 3, IMAGE_SIZE, IMAGE_SIZE


def _images(module: nn.Module, shape: tuple[int, ...]) -> Form:
    free = {0: "batch"}
    if len(shape) == 4:
        free |= {2: "height", 3: "width"}
    return Form(module, shape, ("image",), ("logits",), (free,))


# Recordings ----------------------------------------------------------------------------------


def _takes_recordings(model: nn.Module) -> bool:
    """Return whether a network is one of ours for speech, which this folder may not import."""
    parts = ("forward_features", "forward_head", "output_lengths", "_mask")
    return all(hasattr(model, part) for part in parts)


def _recordings(module: Any, shape: tuple[int, ...]) -> Form:
    outputs = ("logits",) if module.config.head == "keyword" else ("logits", "logit_lengths")
    free = ({0: "batch", 3: "frames"}, {0: "batch"})
    return Form(Recordings(module), shape, ("maps", "lengths"), outputs, free)


class Recordings(nn.Module):
    """A speech network whose masks can be traced: they follow from sizes, and hold none.

    Args:
        network: a `blnet.speech.network.SpeechNet`.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network

    def forward(self, maps: Tensor, lengths: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Return what the network says of recordings.

        Args:
            maps: (N, channels, bins, frames).
            lengths: frames of each recording (N,), int64.

        Returns:
            Logits (N, classes) of a keyword head; of others logits (N, frames, classes) and how
            many of the frames count (N,).
        """
        network = self.network
        network._mask._masks = _LiveMasks(lengths, maps.shape[-1])
        try:
            features = network.forward_features(maps)
        finally:
            network._mask.clear()
        answered = network.output_lengths(lengths)
        logits: Tensor = network.forward_head(features, answered)
        return logits if network.config.head == "keyword" else (logits, answered)


class _LiveMasks(dict[Any, Tensor]):
    """Masks of recordings by the width of the map, made for it when they are asked for.

    Which number of halvings a width stands for is read off the example that is traced; the widths
    and lengths themselves stay symbols.
    """

    def __init__(self, lengths: Tensor, width: Any) -> None:
        super().__init__()
        frames = _example_size(width)
        self._lengths = {frames: lengths}
        while frames > 1:
            lengths, frames = (lengths + 1) // 2, (frames + 1) // 2
            self._lengths[frames] = lengths

    def __bool__(self) -> bool:
        return True

    def __getitem__(self, width: Any) -> Tensor:
        lengths = self._lengths[_example_size(width)]
        frames = torch.arange(width, device=lengths.device)
        return (frames < lengths[:, None])[:, None, None, :]


def _example_size(size: Any) -> int:
    """Return the number that a size is in the example, without asking it of the symbol."""
    if isinstance(size, torch.SymInt):
        return int(size.node.hint)
    return int(size)
