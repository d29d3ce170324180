"""What to measure and how: one dataclass, filled in for the device and checked before a run."""

from __future__ import annotations

import os
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blnet.bench.reading import read_as

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
DEFAULT_MODELS = ("bl_resnet50",)
DEFAULT_BRANCHINGS = ((2, 4), (4, 4))
RESULTS = "results.json"
MIN_SIZE = 32  # pixels; a network that shrinks 32 times needs one position at its end
# Flag -> the smallest and largest value. Above them a run hangs or dies for want of memory.
BOUNDS = {
    "--batch": (1, 65536),
    "--size": (MIN_SIZE, 8192),
    "--repeat": (2, 1_000_000),
    "--threads": (1, 1024),
    "--seed": (0, 2**63 - 1),
    "--seeds": (1, 1000),
    "--epochs": (1, 100_000),
}
MAX_PIXELS = 2**31  # of the throughput batch: 26 GB of float32 images


@dataclass(frozen=True)
class Settings:
    """Settings of one run. None and "auto" are filled in by `resolve`.

    Attributes:
        suites: names of the suites to run; empty for all.
        device: "auto" (a GPU if there is one), "cpu" or "cuda".
        dtype: "float32", "bfloat16" or "float16"; None for the device's default.
        batch: images in the throughput batch; None for the device's default (8, on a GPU 256).
        size: height and width of the images, pixels.
        models: names of networks, as `blnet.registry` knows them.
        model: a network of one's own, in place of `models`: it is measured as it is, and converted
            with each branching.
        input: channels, height and width of the images; None for 3 x size x size.
        branchings: (alpha, beta) pairs measured of every Big-Little network; None for those that
            each suite has by default.
        baseline: name of the plain network to compare with; None for each network's own.
        images: a folder of pictures; None for scikit-learn's two photographs.
        full: take every rung and more rounds, not only those that fit a few minutes.
        repeat: rounds of each group; None for as many as the mode asks for.
        threads: CPU threads of PyTorch; None leaves them as they are.
        seed: of weights, crops and random inputs; the first seed of a study's runs.
        scale: what studies train on, one of `blnet.bench.studies.SCALES`; None for each study's
            default.
        seeds: runs of each network in a study, each with a seed of its own.
        epochs: of a study's runs; None for the recipe's.
        data: pictures or recordings of a study's scale, where it needs any.
        graphs: replay the ops of the kernel suites as CUDA graphs, so that launches cost next to
            nothing. Networks have rungs of their own for that.
    """

    suites: tuple[str, ...] = ()
    device: str = "auto"
    dtype: str | None = None
    batch: int | None = None
    size: int = 224
    models: tuple[str, ...] = DEFAULT_MODELS
    model: str | None = None
    input: tuple[int, int, int] | None = None
    branchings: tuple[tuple[int, int], ...] | None = None
    baseline: str | None = None
    images: str | None = None
    full: bool = False
    repeat: int | None = None
    threads: int | None = None
    seed: int = 0
    scale: str | None = None
    seeds: int = 3
    epochs: int | None = None
    data: str | None = None
    graphs: bool = False

    @property
    def on_gpu(self) -> bool:
        """Whether the run is on a GPU."""
        return self.device == "cuda"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The precision measured in."""
        import torch

        return {
            "float32": torch.float32,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }[self.dtype or "float32"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images."""
        return self.input or (3, self.size, self.size)

    @property
    def throughput_batch(self) -> int:
        """Images in the throughput batch."""
        return self.batch or (256 if self.on_gpu else 8)

    @property
    def batches(self) -> tuple[int, ...]:
        """Batches measured: 1 for latency, and the throughput batch."""
        return (1,) if self.throughput_batch == 1 else (1, self.throughput_batch)

    @property
    def build_seconds(self) -> tuple[float, float]:
        """Seconds that one build, and all of a suite's that compile, may take.

        A quick run shall end within minutes, on two slow cores too.
        """
        if self.full:
            return 1800.0, float("inf")
        return (90.0, 240.0) if self.on_gpu else (60.0, 150.0)

    @property
    def warm_up_seconds(self) -> float:
        """Seconds after which the warm-up of a network on one rung ends, settled or not."""
        return 2.0 if self.full or self.on_gpu else 1.0

    def rounds(self, batch: int) -> int:
        """Return how many rounds a group with this batch is measured for."""
        if self.repeat is not None:
            return self.repeat
        if self.on_gpu:
            return 100 if self.full else 50
        if self.full:
            return 60 if batch == 1 else 30
        return 24 if batch == 1 else 8

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, fit for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Settings:
        """Return the settings that `as_dict` gave, from JSON as well, which knows no tuples.

        A setting that only a later version of blnet has is left out.

        Raises:
            ValueError: if one is of another type.
        """

        def frozen(value: Any) -> Any:
            return tuple(map(frozen, value)) if isinstance(value, list | tuple) else value

        return read_as(cls, {key: frozen(item) for key, item in values.items()}, "the settings")


def resolve(settings: Settings) -> Settings:
    """Return the settings with every default filled in for this machine.

    Raises:
        ValueError: if a value is out of range, or the device is not there.
    """
    import torch

    if settings.device not in DEVICES:
        raise ValueError(f"--device must be one of {', '.join(DEVICES)}, got {settings.device!r}")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here; 'blnet doctor' says why")
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = settings.dtype or ("bfloat16" if device == "cuda" else "float32")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if settings.graphs and device != "cuda":
        raise ValueError("--graphs needs a GPU, and this run is on the CPU; leave it out")
    _check_bounds(settings)
    if not (settings.models or settings.model):
        raise ValueError("--models needs the name of a network at least")
    resolved = replace(settings, device=device, dtype=dtype)
    batch, (_, height, width) = resolved.throughput_batch, resolved.image_shape
    if batch * height * width > MAX_PIXELS:
        raise ValueError(
            f"--batch {batch} at {height}x{width} is {batch * height * width} pixels, and "
            f"{MAX_PIXELS} are the most; choose a smaller batch or size"
        )
    return replace(resolved, batch=batch)


def _check_bounds(settings: Settings) -> None:
    for side in settings.input[1:] if settings.input else ():
        least, most = BOUNDS["--size"]
        if not least <= side <= most:
            raise ValueError(f"--input must have sides of {least} to {most} pixels, got {side}")
    for flag, (least, most) in BOUNDS.items():
        value = getattr(settings, flag.removeprefix("--"))
        if value is not None and value < least:
            raise ValueError(f"{flag} must be at least {least}, got {value}")
        if value is not None and value > most:
            raise ValueError(f"{flag} must be at most {most}, got {value}")


def check_writable(folder: Path, goes_on: bool = False) -> None:
    """Check that a folder can be made and written to, and leave nothing behind.

    Args:
        folder: where the results will lie.
        goes_on: whether the run goes on with what is in the folder, whose results it replaces.

    Raises:
        ValueError: if it cannot, or holds the results of another run.
    """
    if not goes_on and (folder / RESULTS).exists():
        raise ValueError(
            f"--output {folder} holds a {RESULTS} already; name another folder, or go on with an "
            f"interrupted run: --continue {folder}"
        )
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    if not nearest.is_dir():
        raise ValueError(f"--output {folder}: {nearest} is not a folder")
    try:
        handle, name = tempfile.mkstemp(dir=nearest)
    except OSError as error:
        raise ValueError(
            f"--output {folder}: {nearest} cannot be written to ({error.strerror}); choose a "
            "folder that you may write to"
        ) from None
    os.close(handle)
    os.unlink(name)
