"""`blnet.export`: a network as a file for another runtime, checked before it gets its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from blnet.checks import check_choice
from blnet.exporting.formats import FORMATS, OPSET, Format, Runner, Settings
from blnet.exporting.forms import prepared
from blnet.exporting.metadata import describe
from blnet.exporting.parity import Parity, ParityError, compare
from blnet.files import StrPath, reason, written_aside
from blnet.modes import autocast_switched


@dataclass(frozen=True)
class Exported:
    """A written file.

    Attributes:
        path: where it is.
        format: "onnx", "torch" or "exported-program".
        inputs: names of its inputs.
        outputs: names of its outputs.
        dynamic: whether batch and sizes are free; not where the network itself ran at none of the
            other shapes of the check. Without a check, whether they were traced so.
        parity: how far it is from the network; None where that was not checked.
        least: the free axes ("height", say) that are not free from 1 on, with the least sizes that
            the file takes. Of "torch" they are not known.
    """

    path: Path
    format: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: bool
    parity: Parity | None
    least: Mapping[str, int] = field(default_factory=dict)


def export(
    model: nn.Module,
    path: StrPath,
    format: str = "onnx",
    example_input: Tensor | None = None,
    dynamic: bool = True,
    *,
    opset: int = OPSET,
    check: bool = True,
    metadata: Mapping[str, Any] | None = None,
) -> Exported:
    """Write a network for another runtime, for inference in float32.

    The file is written aside, loaded again and run beside the network, with other batches and odd
    sizes where sizes are free; only then is it given its name. What was there is replaced.

    Args:
        model: any network from one tensor to one tensor: `BigLittleNet`, a converted one,
            torchvision's or timm's; or a speech network, which then takes maps
            (N, channels, bins, frames) and lengths (N,), int64. On any device, fused or not; it
            stays as it is. BatchNorm stays a layer of its own: ONNX's exporter and the runtimes
            fold it.
        path: the file to write.
        format: "onnx" (one file, weights inside), "torch" (TorchScript, for torch.jit.load and
            libtorch) or "exported-program" (for torch.export.load).
        example_input: the first input, of which only the shape counts; None for images of 224 x 224
            pixels, or 300 frames of sound.
        dynamic: whether batch and height and width, or batch and frames, are free; else they are
            the example's. Sizes are free from 1 on, or from where the network takes them on.
        opset: version of ONNX's operators, 18 or newer.
        check: whether to run the file; "onnx" needs onnxruntime for that.
        metadata: what to say of the network in the file, anything JSON can hold; see
            `blnet.exporting.metadata.describe`.

    Raises:
        ValueError: if the format is unknown, the network takes or gives something else, does not
            run on the example or cannot be traced; a `ParityError` if the file computes something
            else, or fails, at some size. No file is left then.
        ImportError: if onnx, onnxscript or onnxruntime is missing where needed.
        OSError: if the file cannot be written.
    """
    check_choice("format", format, tuple(FORMATS))
    chosen = FORMATS[format]
    chosen.check_installed(check)
    settings = Settings(dynamic, opset, describe(model, metadata))
    with autocast_switched(False), written_aside(path) as aside:
        form = prepared(model, example_input)
        written = chosen.write(form, settings)
        aside.write_bytes(written.data)
        parity = compare(form, _opened(chosen, aside), dynamic, written.least) if check else None
    if parity is not None and len(parity.shapes) == 1:
        dynamic = False  # the network runs at its example's size only
    return Exported(Path(path), format, form.inputs, form.outputs, dynamic, parity, written.least)


def _opened(format: Format, path: Path) -> Runner:
    try:
        return format.open(path)
    except Exception as error:  # a runtime's own
        raise ParityError(
            f"the written file cannot be opened ({reason(error)}); report it, and try --static or "
            "another --format"
        ) from error
