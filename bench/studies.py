"""What the studies of accuracy share: scales, and one training run as a measurement.

A run of a study is a run of `blnet train vision` or `blnet train speech` with its folder under the
study's output, so that a study that was interrupted goes on where it was, and takes over runs that
are finished, whoever trained them: on eight GPUs, say, by torchrun.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from blnet.bench.continuing import differences
from blnet.bench.results import ELSEWHERE, SCORES, Measurement, read_json
from blnet.bench.settings import RESULTS

if TYPE_CHECKING:
    from blnet.bench.session import Session
    from blnet.bench.settings import Settings
    from blnet.training.command import TrainCommand
    from blnet.training.reporting import Summary
    from blnet.training.task import Task

VISION, SPEECH = "vision", "speech"  # kinds of study
RUNS = "runs"  # folder of the training runs inside a study's output
Add = Callable[[Measurement], None]


@dataclass(frozen=True)
class Scale:
    """A set of pictures or recordings and a recipe that a study can be run on.

    Attributes:
        recipe: name of the recipe.
        about: what it is and what it takes.
        flags: flags of the training command beside the recipe's.
        needs_data: whether --data must name the pictures or recordings.
        kind: what is trained on, vision or speech.
        speakers: run after run each of them is held out in turn; () where seeds are what differs.
        evaluation: member of an archive to evaluate on, where --data names the training part.
    """

    recipe: str
    about: str
    flags: tuple[str, ...] = ()
    needs_data: bool = False
    kind: str = VISION
    speakers: tuple[str, ...] = ()
    evaluation: str | None = None


SCALES = {
    "digits": Scale("digits", "scikit-learn's digits, 8x8 pixels: minutes on a CPU"),
    "cifar10": Scale("cifar10", "CIFAR-10, 32x32 pixels: a GPU, minutes a run", (), True),
    "cifar10_cpu": Scale(
        "cifar10_cpu",
        "CIFAR-10, a quarter of the width: up to half an hour a run on a CPU",
        ("--model.width=0.25",),
        True,
    ),
    "imagenette": Scale(
        "imagenette", "ten classes of ImageNet, 224x224 pixels: a GPU, an hour a run", (), True
    ),
    "imagenet": Scale(
        "imagenet_paper", "ImageNet as in the paper: days a run on one GPU", (), True
    ),
    "synth": Scale("keyword", "words spoken by eSpeak NG: minutes on a CPU", kind=SPEECH),
    "fsdd": Scale(
        "fsdd", "Free Spoken Digits, its own split: minutes a run on a CPU", (), True, SPEECH
    ),
    "fsdd_speakers": Scale(
        "fsdd",
        "Free Spoken Digits, each of its speakers held out in turn",
        (),
        True,
        SPEECH,
        ("george", "jackson", "lucas", "nicolas", "theo", "yweweler"),
    ),
    "yesno": Scale("yesno", "YesNo, transcripts by CTC: minutes a run on a CPU", (), True, SPEECH),
    "so762": Scale(
        "so762",
        "speechocean762's subset, transcripts by CTC: half an hour a run on a CPU",
        (),
        True,
        SPEECH,
        evaluation="test.tsv",
    ),
}
DEFAULT_SCALES = {VISION: "digits", SPEECH: "synth"}
KINDS = {"accuracy": VISION, "conversion": VISION, "speech": SPEECH}  # suite -> what it trains on


def scale_name(settings: Settings, kind: str) -> str:
    """Return the scale that a study of a kind, vision or speech, is run on."""
    return settings.scale or DEFAULT_SCALES[kind]


def run_seeds(settings: Settings, kind: str) -> range:
    """Return the seeds of a study's runs; where speakers are held out, one for each of them."""
    scale = SCALES.get(scale_name(settings, kind))
    speakers = () if scale is None else scale.speakers
    return range(settings.seed, settings.seed + (len(speakers) or settings.seeds))


def check(settings: Settings, kind: str) -> None:
    """Check a study's settings before anything is trained.

    Raises:
        ValueError: if the scale is not one of the study's kind, or its data were not named or are
            not there.
    """
    name = scale_name(settings, kind)
    fitting = [scale for scale, about in SCALES.items() if about.kind == kind]
    if name not in fitting:
        raise ValueError(
            f"--scale of a study of {kind} must be one of {', '.join(fitting)}, got {name!r}"
        )
    if SCALES[name].needs_data and settings.data is None:
        raise ValueError(f"--scale {name} needs --data PATH, what to train and evaluate on")
    if settings.data is None:
        return
    if not SCALES[name].needs_data:
        raise ValueError(f"--data {settings.data} is not read by --scale {name}; leave it out")
    archive = settings.data.partition("::")[0]  # "archive.zip::member"
    if not (Path(settings.data).exists() or Path(archive).exists()):
        raise ValueError(f"--data {archive} does not exist; name what to train and evaluate on")
    if SCALES[name].evaluation and settings.data.endswith(".zip"):
        raise ValueError(
            f"--data {settings.data} is an archive; name the training manifest in it, as in "
            f"{settings.data}::train.tsv"
        )


def goes_on(settings: Settings, folder: Path, studies: Collection[str]) -> bool:
    """Return whether a run goes on with the studies in a folder: all it runs has runs there.

    Args:
        settings: of the run.
        folder: its output.
        studies: names of the suites that are studies.

    Raises:
        ValueError: if the folder holds a study of another scale, of other epochs, or one more.
    """
    mine = set(settings.suites)
    if not mine or not mine <= set(studies) or not (folder / RESULTS).exists():
        return False
    if not all((folder / RUNS / suite).is_dir() for suite in mine):
        return False
    before = read_json(folder / RESULTS)
    default = DEFAULT_SCALES[KINDS[next(iter(mine))]]
    for name, unset in (("scale", default), ("epochs", None)):
        then, now = before.settings.get(name) or unset, getattr(settings, name) or unset
        if then != now:
            raise ValueError(
                f"--output {folder} holds a study of --{name} {then}, and here it is {now}; give "
                "the same, or name another folder"
            )
    lost = sorted({m.suite for m in before.measurements} - mine)
    if lost:
        raise ValueError(
            f"--output {folder} holds the study {lost[0]} as well, whose results would be lost; "
            "name it too, or another folder"
        )
    return True


def command_of(kind: str) -> TrainCommand:
    """Return the training command of a kind, vision or speech."""
    command: TrainCommand = import_module(f"blnet.{kind}.train").COMMAND
    return command


def configure(
    settings: Settings, kind: str, model: list[str], folder: Path, seed: int,
    epochs: int | None = None,
) -> tuple[Any, str]:  # fmt: skip
    """Return the configuration of a study's run, and the command that trains it elsewhere.

    Args:
        settings: of the study.
        kind: vision or speech.
        model: flags that say which network.
        folder: of the run.
        seed: of the run.
        epochs: in place of the recipe's and the settings'.
    """
    scale = SCALES[scale_name(settings, kind)]
    words = ["--recipe", scale.recipe, *scale.flags, "--baseline=false", *model]
    words += _data_flags(scale, settings.data)
    if scale.speakers:
        words += [f"--data.holdout-speaker={scale.speakers[seed % len(scale.speakers)]}"]
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
    config, _ = command_of(kind).parse(words)
    return config, shlex.join(["blnet", "train", kind, *words])


def _data_flags(scale: Scale, data: str | None) -> list[str]:
    if data is None:
        return []
    flags = [f"--data.path={data}"]
    if data.endswith(".npz") and scale.recipe == "imagenette":
        flags += ["--data.name=npz"]
    if scale.evaluation:
        archive, separator, _ = data.rpartition("::")
        place = f"{archive}{separator}" if separator else f"{Path(data).parent}/"
        flags += [f"--data.eval-path={place}{scale.evaluation}"]
    return flags


def train(
    session: Session,
    suite: str,
    family: str,
    seed: int,
    model: list[str],
    facts: dict[str, Any],
    epochs: int | None = None,
    kind: str = VISION,
) -> Measurement:
    """Train a network, or take over its finished run; what went wrong is in the measurement.

    Args:
        session: of the study.
        suite: name of the suite.
        family: what tables call the network.
        seed: of the run.
        model: flags of the training command that say which network.
        facts: what the suite knows of it.
        epochs: in place of the recipe's and the settings'.
        kind: vision or speech.

    Returns:
        A measurement whose samples are seconds an epoch, with the last evaluation's metrics (0 to
        1), epochs, samples, parameters and MACs among its facts, and what of its environment is not
        that of the session.

    Raises:
        KeyboardInterrupt: if the run was stopped; its checkpoint goes on with the study.
    """
    from blnet.training.journal import read_rows
    from blnet.training.stopping import Interrupted

    settings = session.settings
    folder = run_folder(session, suite, family, seed)
    scale = scale_name(settings, kind)
    made = Measurement(suite, scale, family, f"seed {seed}", facts={**facts, "seed": seed})
    step = f"{suite}, {scale}: {family}, seed {seed}"
    session.watch(step, 0.0)
    folder.mkdir(parents=True, exist_ok=True)  # by which a study that was interrupted is known
    try:
        config, command = configure(settings, kind, model, folder, seed, epochs)
        made.description = command
        made.facts |= _trained(session, kind, config, folder)
        made.facts |= _elsewhere(session, folder)
    except Interrupted:
        raise KeyboardInterrupt from None
    except (ValueError, OSError) as error:
        made.status, made.note = "error", " ".join(str(error).split())
        return made
    made.samples = [float(row["seconds"]) for row in read_rows(folder, "epoch")]
    made.status = "ok"
    session.watch(step, 2.0)
    return made


def run_folder(session: Session, suite: str, family: str, seed: int) -> Path:
    """Return the folder of a network's run with a seed."""
    return session.folder / RUNS / suite / f"{_file_name(family)}-seed{seed}"


def _trained(session: Session, kind: str, config: Any, folder: Path) -> dict[str, Any]:
    """Run the training, and return what it came to.

    Raises:
        ValueError: if it could not be trained, or a score is no number.
    """
    from rich.console import Console

    from blnet.trained import load_network
    from blnet.training.devices import make_accelerator
    from blnet.training.run import run

    command = command_of(kind)
    # Most runs differ in network and seed only, so all see the same pictures or recordings.
    key = ("data", kind, config.data, config.augment)
    first = session.cached(key, lambda: command.make_task(config))
    task = command.make_task(config, first)
    with (folder / "log.txt").open("a", encoding="utf-8") as log:
        console = Console(file=log, width=140)
        summary = run(task, config, folder, make_accelerator(config), console)
    facts = _facts(config, summary, task)
    for name in SCORES:
        if not math.isfinite(facts.get(name, 0.0)):
            raise ValueError(f"its {name} is no number, so there is nothing to compare")
    cost = task.cost(load_network(folder)[0])
    return {"parameters": cost.parameters, "macs": cost.macs, **facts}


def _elsewhere(session: Session, folder: Path) -> dict[str, dict[str, str]]:
    """Return what the environment of a run has unlike the session's: it may be taken over."""
    from blnet.training.journal import RUN, read_rows

    try:
        trained = json.loads((folder / RUN).read_text(encoding="utf-8"))["environment"]
        found = differences(trained, session.results.environment)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or a damaged one
        return {ELSEWHERE: {"environment": "unknown"}}
    # That is the last session's. What a run was resumed on stands in the journal.
    devices = dict.fromkeys(str(row.get("device")) for row in read_rows(folder, "start"))
    if len(devices) > 1:
        found["device"] = ", then ".join(devices)
    return {ELSEWHERE: found} if found else {}


def _facts(config: Any, summary: Summary, task: Task) -> dict[str, Any]:
    from blnet.training.task import count_of

    steps = count_of(task.train_data) // config.batch_size
    return {
        # The last network's, not the best one's: choosing by the test data would flatter.
        **summary.last,
        "monitor": task.monitor,
        "epochs": config.epochs,
        "steps": steps,
        "images": steps * config.batch_size * config.epochs,
        "evaluation_images": count_of(task.eval_data),
        "train_seconds": summary.train_seconds,
        "waiting": summary.waiting,
    }


def median_epoch(measurements: list[Measurement]) -> float | None:
    """Return the median of the seconds an epoch took, over all runs; None where none was timed."""
    seconds = [sample for m in measurements if m.timed for sample in m.samples]
    return median(seconds) if seconds else None


def _file_name(family: str) -> str:
    return "".join(c if c.isalnum() or c in "-_" else "-" for c in family)
