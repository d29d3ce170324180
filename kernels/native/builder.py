"""The builder of programs, op by op.

    builder = Builder((8, 3, 224, 224))
    y = builder.conv(builder.input, weight, bias, stride=(2, 2), padding=(3, 3), relu=True)
    program = builder.build([y])
    (out,) = program(images)

Maps are float32 in blocks of 16 channels (see step.h). The builder checks sizes; the kernels do
not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blnet.kernels.native import direct, stem
from blnet.kernels.native.arena import Draft, Map, Shape
from blnet.kernels.native.convolution import Convolution
from blnet.kernels.native.cutting import BLOCK, blocks_of, cut_rows
from blnet.kernels.native.library import MAXIMUM_OUTPUTS, Library, Step, load
from blnet.kernels.native.packing import METHODS, pack
from blnet.kernels.native.program import Program
from blnet.kernels.native.winograd import TILES, tile_of

Pair = tuple[int, int]
Windows = Sequence[tuple[int, int, int]]

# As in step.h; the convolutions' are in their modules.
IMPORT, EXPORT, AVERAGE, MAXIMUM, COMBINE, AFFINE, SIGMOID = 0, 1, 4, 5, 6, 7, 8


@dataclass(frozen=True)
class Output:
    """How a program gives a map to its caller.

    Attributes:
        source: the map, (N, C, H, W).
        shape: of the tensor, with as many values as the map.
        channels_last: whether it holds them as (N, H, W, C), not as (N, C, H, W).
    """

    source: Map
    shape: tuple[int, ...]
    channels_last: bool = False


class Builder:
    """Builds a program for inputs of one shape.

    Args:
        shape: of the input, (N, C, H, W).
        threads: how many threads the work is cut for; None for as many as PyTorch has now.

    Raises:
        NativeError: if the library cannot be had here.
        ValueError: if the shape is of a batch without images.
    """

    def __init__(self, shape: Shape, threads: int | None = None) -> None:
        if shape[0] < 1:
            raise ValueError(
                f"the batch of shape {tuple(shape)} is empty; build for one image or more"
            )
        self.library: Library = load()
        self.threads = threads or torch.get_num_threads()
        self.input = Map(shape, is_input=True)
        self._drafts: list[Draft] = []
        self._imported: Map | None = None

    def conv(
        self,
        x: Map,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        groups: int = 1,
        residual: Map | None = None,
        table: Tensor | None = None,
        relu: bool = False,
        method: str | None = None,
    ) -> Map:
        """Return the convolution of a map, plus a residual, through ReLU.

        Args:
            x: shape (N, C, H, W).
            weight: shape (C_out, C / groups, K_h, K_w).
            bias: shape (C_out,); None for 0.
            stride: in height and width.
            padding: zeros at either side, in height and width.
            groups: as of torch.nn.Conv2d. Groups narrower than a block are computed as one dense
                block with zeros between them, so that NaN and infinity of a channel reach those of
                the groups beside it, where PyTorch keeps them apart.
            residual: shape (N, C_out, H_r, W_r), added before ReLU; None for 0.
            table: the residual's pixel for each pixel of the output, see `pixel_table`; None
                where sizes are the same.
            relu: whether ReLU follows.
            method: one of `packing.METHODS`, if it is for such a kernel and stride (see
                `winograd.TILES` and stem.py); None for the fastest by count.

        Returns:
            Shape (N, C_out, H_out, W_out).

        Raises:
            ValueError: if sizes do not fit each other, or the method does not fit them.
        """
        _check_method(method, weight, stride, groups)
        planar = x.is_input and x.shape[1] <= 4 and method in (None, direct.METHOD, stem.METHOD)
        if x.is_input and not planar:
            x = self._blocked(x)
        sizes: Shape = tuple(weight.shape)  # type: ignore[assignment]
        stride, padding = (stride[0], stride[1]), (padding[0], padding[1])  # of any sequence
        conv = Convolution(x.shape, sizes, stride, padding, groups, planar and groups == 1)
        if planar and not conv.planar:
            x = self._blocked(x)
        _check_conv(conv)
        if method == stem.METHOD and not stem.fits(conv):
            raise ValueError(
                f"conv: {method} is for kernels of 7x7, a stride of (2, 2), one group and a "
                f"program's input of up to 4 channels, got a weight of shape {sizes}, stride "
                f"{tuple(stride)} and {groups} groups; leave method out"
            )
        packed = pack(self.library, conv, weight.detach(), bias, self.threads, method)
        tensors = {"weight": packed.weight, "bias": packed.bias, "segments": packed.segments}
        if packed.starts is not None:
            tensors["starts"] = packed.starts
        height, width = sizes[2:]
        text = f"conv {height}x{width} {x.shape[1]}->{sizes[0]}"
        text += f"/{stride[0]}" if stride[0] == stride[1] != 1 else ""
        text += f" groups {groups}" if groups > 1 else ""
        text += f" {packed.method}" if packed.method != direct.METHOD else ""
        draft = Draft(packed.step, text, Map(conv.out_shape), x, scratch=packed.scratch)
        draft.tensors = tensors
        return self._finish(draft, residual, table, relu)

    def pool(self, x: Map, rows: Windows, columns: Windows, *, average: bool) -> Map:
        """Return averages or maxima over windows.

        Args:
            x: shape (N, C, H, W).
            rows: for each row of the output first, end and the length to divide by, within the map.
            columns: the same for the columns.
            average: the sum over the window divided by both lengths; else the maximum.

        Returns:
            Shape (N, C, len(rows), len(columns)).
        """
        x = self._blocked(x)
        size = (len(rows), len(columns))
        step = self._plain_step(x, AVERAGE if average else MAXIMUM, size)
        target = Map((*x.shape[:2], len(rows), len(columns)))
        name = "average" if average else "maximum"
        draft = Draft(step, f"{name} {_window(rows)}x{_window(columns)}", target, x)
        draft.tensors = {
            "rows": torch.tensor(rows, dtype=torch.int32, device="cpu"),
            "columns": torch.tensor(columns, dtype=torch.int32, device="cpu"),
        }
        return self._finish(draft)

    def combine(
        self,
        x: Map,
        residual: Map | None = None,
        table: Tensor | None = None,
        *,
        multiply: bool = False,
        relu: bool = False,
    ) -> Map:
        """Return x + residual or x * residual, through ReLU.

        Args:
            x: shape (N, C, H, W).
            residual: shape (N, C, H_r, W_r); None for x alone.
            table: see `conv`.
            multiply: whether to multiply in place of adding.
            relu: whether ReLU follows.
        """
        x = self._blocked(x)
        step = self._plain_step(x, COMBINE)
        step.multiply = multiply
        text = "multiply" if multiply else "add" if residual else "map"
        return self._finish(Draft(step, text, Map(x.shape), x), residual, table, relu, text)

    def resize(self, x: Map, table: Tensor, size: Pair) -> Map:
        """Return a map whose pixels are copies of x's pixels.

        Args:
            x: shape (N, C, H, W).
            table: the pixel of x for each pixel, see `pixel_table`.
            size: (H_out, W_out).
        """
        x = self._blocked(x)
        # The sum of nothing and x: a step that reads the residual alone.
        step = self._plain_step(x, COMBINE, size)
        draft = Draft(step, "resize", Map((*x.shape[:2], *size)), None)
        return self._finish(draft, x, table)

    def affine(self, x: Map, scale: Tensor, shift: Tensor, *, relu: bool = False) -> Map:
        """Return scale x + shift through ReLU, both of shape (C,)."""
        x = self._blocked(x)
        draft = Draft(self._plain_step(x, AFFINE), "scale and shift", Map(x.shape), x)
        size = blocks_of(x.shape[1]) * BLOCK
        draft.tensors = {"weight": _padded(scale, size), "bias": _padded(shift, size)}
        return self._finish(draft, relu=relu)

    def sigmoid(self, x: Map) -> Map:
        """Return 1 / (1 + exp(-x))."""
        x = self._blocked(x)
        return self._finish(Draft(self._plain_step(x, SIGMOID), "sigmoid", Map(x.shape), x))

    def cat(self, maps: Sequence[Map]) -> Map:
        """Return maps side by side in their channels.

        Raises:
            ValueError: if any but the last has channels that are no multiple of 16, or sizes
                differ.
        """
        first = maps[0].shape
        if any(part.shape[1] % BLOCK for part in maps[:-1]):
            raise ValueError(
                f"cat: all maps but the last must have a multiple of {BLOCK} channels, got "
                f"{[part.shape[1] for part in maps]}; take another engine"
            )
        if any((p.shape[0], *p.shape[2:]) != (first[0], *first[2:]) for p in maps):
            raise ValueError(f"cat: shapes {[p.shape for p in maps]} differ in more than channels")
        target = Map((first[0], sum(part.shape[1] for part in maps), *first[2:]))
        offset = 0
        for part in maps:
            source = self._blocked(part)
            draft = Draft(self._plain_step(source, COMBINE), "copy for cat", target, source)
            draft.offset = offset
            self._finish(draft)
            offset += source.image
        return target

    def build(self, outputs: Sequence[Map | Output]) -> Program:
        """Return the program that computes these maps; a bare one comes as (N, C, H, W).

        Raises:
            ValueError: if there are more outputs than a call can have, or a shape does not fit.
        """
        if len(outputs) > MAXIMUM_OUTPUTS:
            raise ValueError(f"a program has at most {MAXIMUM_OUTPUTS} outputs, got {len(outputs)}")
        whole = [out if isinstance(out, Output) else Output(out, out.shape) for out in outputs]
        sources = [self._blocked(output.source) for output in whole]
        exports = [
            self._export(source, index, output)
            for index, (source, output) in enumerate(zip(sources, whole, strict=True))
        ]
        shapes = [output.shape for output in whole]
        drafts = [*self._drafts, *exports]
        return Program(self.library, self.input.shape, drafts, shapes, self.threads)

    def _export(self, source: Map, index: int, output: Output) -> Draft:
        if math.prod(output.shape) != math.prod(source.shape):
            raise ValueError(f"an output of shape {output.shape} does not hold {source.shape}")
        step = self._plain_step(source, EXPORT)
        step.output, step.channels_last = index, output.channels_last
        return Draft(step, "write the output", None, source)

    def _blocked(self, x: Map) -> Map:
        """Return a map in blocks: the input is brought to them once."""
        if not x.is_input:
            return x
        if self._imported is None:
            draft = Draft(self._plain_step(x, IMPORT), "read the input", Map(x.shape))
            self._imported = self._finish(draft)
        return self._imported

    def _plain_step(self, x: Map, kind: int, size: Pair | None = None) -> Step:
        """Return a step that works block by block, to a map of this size; None for x's own."""
        images, channels, height, width = x.shape
        step = Step(kind=kind, batch=images, channels=channels)
        step.blocks = step.out_blocks = blocks_of(channels)
        step.height, step.width = height, width
        step.out_height, step.out_width = size or (height, width)
        cut_rows(step, self.threads if kind != EXPORT else 1)
        return step

    def _finish(
        self,
        draft: Draft,
        residual: Map | None = None,
        table: Tensor | None = None,
        relu: bool = False,
        verb: str = "add",
    ) -> Map:
        """Add what all steps may have, and the step to the list."""
        target = draft.target
        assert target is not None
        step = draft.step
        step.relu = relu
        if residual is not None:
            residual = self._blocked(residual)
            _check_residual(target, residual, table)
            draft.residual = residual
            step.residual_block = residual.shape[2] * residual.shape[3] * BLOCK
            if table is not None:
                draft.tensors["table"] = table
            if draft.text != verb:
                draft.text += " + upsampled" if table is not None else " + add"
        draft.text += " + relu" if relu else ""
        self._drafts.append(draft)
        return target


def pixel_table(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Return the flat index of pixel (rows[i], columns[j]) of a map so wide, int32 (H * W,)."""
    return (rows[:, None] * width + columns[None, :]).flatten().to(torch.int32)


def _padded(values: Tensor, size: int) -> Tensor:
    padded = torch.zeros(size, dtype=torch.float32, device="cpu")
    padded[: len(values)] = values.detach()
    return padded


def _window(windows: Windows) -> int:
    return max(end - first for first, end, _ in windows)


def _check_conv(conv: Convolution) -> None:
    channels, out_channels = conv.shape[1], conv.weight[0]
    if conv.weight[1] * conv.groups != channels or out_channels % conv.groups:
        raise ValueError(
            f"conv: a weight of shape {conv.weight} in {conv.groups} groups does not fit an input "
            f"of shape {conv.shape}; it takes {conv.weight[1] * conv.groups} channels"
        )
    if min(conv.out_shape) < 1:
        raise ValueError(
            f"conv: a kernel of {conv.weight[2:]} is larger than the padded input {conv.shape}"
        )


def _check_method(method: str | None, weight: Tensor, stride: Pair, groups: int) -> None:
    if method in (None, direct.METHOD, stem.METHOD):
        return
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    kernel = tuple(weight.shape[2:])
    if kernel != (3, 3) or tile_of(method, (stride[0], stride[1])) is None or groups != 1:
        strides = ", ".join(str(tile.stride) for tile in TILES if tile.name == method)
        raise ValueError(
            f"conv: {method} is for kernels of 3x3, a stride of {strides} and one group, got a "
            f"kernel of {kernel}, stride {tuple(stride)} and {groups} groups; leave method out"
        )


def _check_residual(target: Map, residual: Map, table: Tensor | None) -> None:
    images, channels, height, width = target.shape
    if residual.shape[:2] != (images, channels):
        raise ValueError(f"a residual of shape {residual.shape} does not fit {target.shape}")
    if table is None and residual.shape != target.shape:
        raise ValueError(
            f"a residual of shape {residual.shape} needs a table to be added to {target.shape}"
        )
    if table is not None:
        pixels = residual.shape[2] * residual.shape[3]
        fits = len(table) == height * width and 0 <= int(table.min()) <= int(table.max()) < pixels
        if table.dtype != torch.int32 or not fits:
            raise ValueError(f"the table for shapes {residual.shape} and {target.shape} is wrong")
