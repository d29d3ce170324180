"""What the studies of accuracy share: scales, and one training run as a measurement.

A run of a study is a run of `blnet train vision` with its folder under the study's output, so that
a study that was interrupted goes on where it was, and takes over runs that are finished, whoever
trained them: on eight GPUs, say, by torchrun.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from blnet.bench.results import Measurement

if TYPE_CHECKING:
    from blnet.bench.session import Session
    from blnet.bench.settings import Settings
    from blnet.training.reporting import Summary
    from blnet.vision.config import VisionConfig

RUNS = "runs"  # folder of the training runs inside a study's output
Add = Callable[[Measurement], None]


@dataclass(frozen=True)
class Scale:
    """A set of pictures and a recipe that a study can be run on.

    Attributes:
        recipe: name of the recipe.
        about: what it is and what it takes.
        flags: flags of `blnet train vision` beside the recipe's.
        needs_data: whether --data must name the pictures.
    """

    recipe: str
    about: str
    flags: tuple[str, ...] = ()
    needs_data: bool = False


SCALES = {
    "digits": Scale("digits", "scikit-learn's digits, 8x8 pixels: minutes on a CPU"),
    "cifar10": Scale("cifar10", "CIFAR-10, 32x32 pixels: a GPU, minutes a run", (), True),
    "imagenette": Scale(
        "imagenette", "ten classes of ImageNet, 224x224 pixels: a GPU, an hour a run", (), True
    ),
    "imagenet": Scale(
        "imagenet_paper", "ImageNet as in the paper: days a run on one GPU", (), True
    ),
}


def check(settings: Settings) -> None:
    """Check a study's settings before anything is trained.

    Raises:
        ValueError: if the scale is not known, or its pictures were not named.
    """
    if settings.scale not in SCALES:
        raise ValueError(f"--scale must be one of {', '.join(SCALES)}, got {settings.scale!r}")
    if SCALES[settings.scale].needs_data and settings.data is None:
        raise ValueError(
            f"--scale {settings.scale} needs --data PATH, the pictures to train and evaluate on"
        )


def configure(
    settings: Settings, model: list[str], folder: Path, seed: int, epochs: int | None = None
) -> tuple[VisionConfig, str]:
    """Return the configuration of a study's run, and the command that trains it elsewhere.

    Args:
        settings: of the study.
        model: flags that say which network.
        folder: of the run.
        seed: of the run.
        epochs: in place of the recipe's and the settings'.
    """
    from blnet.vision.train import COMMAND

    scale = SCALES[settings.scale]
    words = ["--recipe", scale.recipe, *scale.flags, "--baseline=false", *model]
    if settings.data is not None:
        words += [f"--data.path={settings.data}"]
        if settings.data.endswith(".npz") and scale.recipe == "imagenette":
            words += ["--data.name=npz"]
    epochs = epochs or settings.epochs
    words += [f"--epochs={epochs}"] if epochs else []
    words += [
        f"--seed={seed}",
        f"--device={settings.device}",
        f"--output={folder}",
        "--resume=auto",
        "--tensorboard=false",
        "--keep=1",
    ]
    config, _ = COMMAND.parse(words)
    return config, shlex.join(["blnet", "train", "vision", *words])


def train(
    session: Session,
    suite: str,
    family: str,
    seed: int,
    model: list[str],
    facts: dict[str, Any],
    epochs: int | None = None,
) -> Measurement:
    """Train a network, or take over its finished run; what went wrong is in the measurement.

    Args:
        session: of the study.
        suite: name of the suite.
        family: what tables call the network.
        seed: of the run.
        model: flags of `blnet train vision` that say which network.
        facts: what the suite knows of it.
        epochs: in place of the recipe's and the settings'.

    Returns:
        A measurement whose samples are seconds an epoch, with accuracy (0 to 1), epochs, images,
        parameters and MACs among its facts.

    Raises:
        KeyboardInterrupt: if the run was stopped; its checkpoint goes on with the study.
    """
    from blnet.training.journal import read_rows
    from blnet.training.stopping import Interrupted

    settings = session.settings
    folder = session.folder / RUNS / suite / f"{_file_name(family)}-seed{seed}"
    made = Measurement(suite, settings.scale, family, f"seed {seed}", facts={**facts, "seed": seed})
    step = f"{suite}, {settings.scale}: {family}, seed {seed}"
    session.watch(step, 0.0)
    try:
        config, command = configure(settings, model, folder, seed, epochs)
        made.description = command
        made.facts |= _trained(session, config, folder)
    except Interrupted:
        raise KeyboardInterrupt from None
    except (ValueError, OSError) as error:
        made.status, made.note = "error", " ".join(str(error).split())
        return made
    made.samples = [float(row["seconds"]) for row in read_rows(folder, "epoch")]
    made.status = "ok"
    session.watch(step, 2.0)
    return made


def _trained(session: Session, config: VisionConfig, folder: Path) -> dict[str, Any]:
    """Run the training, and return what it came to."""
    from rich.console import Console

    from blnet.training.devices import make_accelerator
    from blnet.training.run import run
    from blnet.vision.data import load_data
    from blnet.vision.task import ImageTask

    config.check()
    # The runs differ in network and seed only, so all see the same pictures.
    data = session.cached(
        ("data", config.data, config.augment), lambda: load_data(config.data, config.augment)
    )
    task = ImageTask(config, data)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        console = Console(file=log, width=140)
        summary = run(task, config, folder, make_accelerator(config), console)
    return {**cost(task, folder), **_facts(config, summary, data.counts)}


def _facts(config: VisionConfig, summary: Summary, counts: tuple[int, int]) -> dict[str, Any]:
    images = (counts[0] // config.batch_size) * config.batch_size * config.epochs
    return {
        # The last network's, not the best one's: choosing by the test images would flatter.
        "accuracy": summary.last["accuracy"],
        "loss": summary.last["loss"],
        "epochs": config.epochs,
        "images": images,
        "evaluation_images": counts[1],
        "train_seconds": summary.train_seconds,
        "waiting": summary.waiting,
    }


def cost(task: Any, folder: Path) -> dict[str, Any]:
    """Return parameters, and MACs for one image, of the network that a run trained."""
    from blnet import profile
    from blnet.training.networks import load_network

    model, _ = load_network(folder)
    shape = task.data.preprocessing
    found = profile(model, (1, shape.channels, shape.size, shape.size))
    return {"parameters": found.parameters, "macs": found.macs}


def median_epoch(measurements: list[Measurement]) -> float | None:
    """Return the median of the seconds an epoch took, over all runs; None where none was timed."""
    seconds = [sample for m in measurements if m.timed for sample in m.samples]
    return median(seconds) if seconds else None


def _file_name(family: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in family)
