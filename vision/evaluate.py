"""``blnet evaluate vision``: measures the accuracy of trained networks on images."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from accelerate import Accelerator

from blnet.checks import positive
from blnet.commands.device import add_device_flag
from blnet.environment import collect
from blnet.files import make_folder, reason
from blnet.trained import add_trust_flag, check_moved, is_foreign
from blnet.training.config import Precision
from blnet.training.devices import by_first, make_accelerator
from blnet.training.display import plain_console
from blnet.vision import reproduction
from blnet.vision.classes import check_same_names
from blnet.vision.config import DataConfig, DataName, VisionConfig
from blnet.vision.data import ImageData, load_data
from blnet.vision.inference import Trained, load_trained
from blnet.vision.measurement import Measurement, measure
from blnet.vision.preprocessing import Preprocessing
from blnet.vision.report import Evaluation, as_table, write_results

__all__ = ["Measurement", "configure", "evaluation_data", "measure", "run"]

_BATCH = 128
_EXAMPLES = """examples:
  blnet evaluate vision results/digits
  blnet evaluate vision results/digits results/digits/baseline --output results/digits/evaluation
  blnet evaluate vision bL-ResNet-50.pth --data imagenet --data-path /data/imagenet --paper
  torchrun --nproc-per-node 8 -m blnet.cli evaluate vision best.safetensors --eval-path /data/val"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.epilog = _EXAMPLES
    parser.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a .safetensors file, a run's folder (its best network) or a published .pth file",
    )
    add_trust_flag(parser)
    _add_data_flags(parser.add_argument_group("data, by default what the network was trained on"))
    parser.add_argument(
        "--batch", type=positive, default=_BATCH, metavar="N",
        help=f"images that a device takes at once ({_BATCH})",
    )  # fmt: skip
    add_device_flag(parser)
    parser.add_argument("--workers", type=int, metavar="N",
                        help="processes that load images for each device (chosen for it)")  # fmt: skip # noqa: E501
    parser.add_argument("--precision", choices=get_args(Precision), default="fp32",
                        help="fp32, or automatic mixed precision in bf16 or fp16")  # fmt: skip
    parser.add_argument(
        "--output", metavar="DIR",
        help="write results.json, per_class.csv, confusion.csv and confusion.png there",
    )  # fmt: skip
    parser.add_argument(
        "--paper", action="store_true",
        help="print the errors beside those of the paper's table (ImageNet's validation set only)",
    )  # fmt: skip


def _add_data_flags(group: Any) -> None:
    """Add the data's flags; the names that training gives them, which errors use, are known too."""
    group.add_argument("--data", "--data.name", dest="data", choices=get_args(DataName),
                       metavar="NAME", help=f"{', '.join(get_args(DataName))}")  # fmt: skip
    group.add_argument("--data-path", "--data.path", dest="path", metavar="PATH",
                       help="folder or .npz file of the whole set")  # fmt: skip
    group.add_argument("--eval-path", "--data.eval-path", dest="eval_path", metavar="PATH",
                       help="the images to evaluate on: a folder of class folders, an .npz file "
                       "or shards")  # fmt: skip
    group.add_argument("--download", "--data.download", dest="download", action="store_true",
                       default=None, help="fetch cifar10 or cifar100 into --data-path")  # fmt: skip
    for flag, text in (
        ("--limit", "at most so many images, balanced over the classes"),
        ("--eval-images", "fake: number of images"),
        ("--classes", "webdataset and fake: number of classes"),
    ):
        group.add_argument(flag, flag.replace("--", "--data."), dest=flag[2:].replace("-", "_"),
                           type=positive, metavar="N", help=text)  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Evaluate every checkpoint, print the table and write the files that were asked for."""
    config = VisionConfig(batch_size=args.batch, device=args.device, workers=args.workers,
                          precision=args.precision)  # fmt: skip
    config.check()
    accelerator = make_accelerator(config)
    if args.output is not None:
        by_first(lambda: make_folder(args.output), accelerator)
    evaluations = []
    for trained, settings, data in _prepared(args):
        try:
            measured = measure(trained.model, data, config, accelerator)
        except ValueError as error:
            raise ValueError(f"{trained.source}: {error}") from error
        trained.model.cpu()
        evaluations.append(Evaluation(trained, settings, data, measured))
    if accelerator.is_main_process:
        _report(args, config, evaluations, accelerator)
    return 0


def _prepared(args: argparse.Namespace) -> list[tuple[Trained, DataConfig, ImageData]]:
    """Load every network and its data, so that whatever is wrong shows before the work begins."""
    sets: dict[tuple[DataConfig, Preprocessing], ImageData] = {}
    prepared = []
    for name in args.checkpoints:
        trained = load_trained(name, args.trust_source)
        settings = data_settings(trained, vars(args))
        if args.paper:
            reproduction.check_data(settings)
            reproduction.check_preprocessing(name, trained.preprocessing)
        key = settings, trained.preprocessing
        if key not in sets:
            sets[key] = evaluation_data(settings, trained.preprocessing)
        check_same_classes(trained, settings, sets[key])
        if args.paper:
            reproduction.check_classes(len(sets[key].classes))
        prepared.append((trained, settings, sets[key]))
    return prepared


def data_settings(trained: Trained, given: Mapping[str, Any]) -> DataConfig:
    """Return which data to evaluate a network on: what it was trained on, changed by flags.

    Of a folder or archive, where the network was trained on a set of another name, all is
    evaluated, or the part of it that is there for that.

    Args:
        trained: the network.
        given: flag -> value: data (the set's name), path, eval_path, download, limit, eval_images,
            classes and paper; None where it was not given.

    Raises:
        ValueError: if nobody says which data, or a setting makes no sense.
    """
    name = given.get("data")
    recorded = settings = _recorded(trained)
    if name is not None and (settings is None or settings.name != name):
        settings = DataConfig(name=name)
    if settings is None:
        raise ValueError(
            f"{trained.source} does not say what it was trained on; name the data with --data, and "
            "where they are with --data-path"
        )
    changes = {
        field: given[field]
        for field in ("path", "eval_path", "download", "limit", "eval_images", "classes")
        if given.get(field) is not None
    }
    named = tuple(changes)
    if settings.name in ("folder", "npz") and "path" in changes:
        before = (recorded.name, recorded.path) if recorded else (None, None)
        if is_foreign(settings.name, changes["path"], *before):
            changes.setdefault("eval_path", changes["path"])
    if recorded and settings.name != recorded.name and _same(recorded.path, changes.get("path")):
        # By another name the same part is held out.
        kept = ("holdout", "split_seed", "eval_path")
        changes = {field: getattr(recorded, field) for field in kept} | changes
    if "path" in changes and "eval_path" not in changes:
        check_moved(changes["path"], settings.path, settings.eval_path)
    moved = "eval_path" in changes and settings.eval_path is None
    if moved or given.get("paper"):  # how many there were of another part says nothing
        changes.setdefault("limit", None)
    settings = dataclasses.replace(settings, **changes)
    settings.check()
    settings.check_read(named)
    return settings


def _same(one: str | None, other: str | None) -> bool:
    return None not in (one, other) and os.path.realpath(str(one)) == os.path.realpath(str(other))


def _recorded(trained: Trained) -> DataConfig | None:
    found = trained.extra.get("data")
    if found is None:
        return None
    known = {field.name for field in dataclasses.fields(DataConfig)}
    try:
        settings = DataConfig(**{k: v for k, v in found.items() if k in known})
        settings.check()
    except (TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{trained.source} has data settings that make no sense "
                         f"({reason(error)}); name the data with --data") from error  # fmt: skip
    return settings


def evaluation_data(settings: DataConfig, preprocessing: Preprocessing) -> ImageData:
    """Return the evaluation part of a set as a network is to see it.

    Args:
        settings: which set.
        preprocessing: of the network, whatever the set's own may be.

    Raises:
        ValueError: if the images are not there or cannot be read.
    """
    sized = dataclasses.replace(
        settings, size=preprocessing.size, crop_ratio=preprocessing.crop_ratio
    )
    return load_data(sized, parts="evaluation", preprocessing=preprocessing)


def check_same_classes(trained: Trained, settings: DataConfig, data: ImageData) -> None:
    """Check that a network answers for the classes of the data, in number and, if known, by name.

    Raises:
        ValueError: naming both and the first class that differs.
    """
    advice = "evaluate it on data with the classes that it was trained on"
    if trained.classes != len(data.classes):
        raise ValueError(f"{trained.source} knows {trained.classes} classes and {data.name} has "
                         f"{len(data.classes)}; {advice}")  # fmt: skip
    told = (trained.source, data.name, advice)
    check_same_names(trained.names, trained.extra, data.classes, settings.name, told)


def _report(
    args: argparse.Namespace,
    config: VisionConfig,
    evaluations: Sequence[Evaluation],
    accelerator: Accelerator,
) -> None:
    """Print the tables and write the files."""
    kind = accelerator.device.type
    device = collect("cpu" if kind == "cpu" else None).device
    console = plain_console()
    console.print(as_table(evaluations, device, config.precision))
    rows = None
    if args.paper:
        measured = [_as_row(one) for one in evaluations]
        rows = reproduction.reproduce(measured)
        console.print(reproduction.as_table(rows, evaluations[0].measured.images))
        for line in reproduction.strangers(measured):
            print(line)
    if args.output is not None:
        write_results(Path(args.output), evaluations, config, kind, accelerator.num_processes, rows)
        print(f"wrote {args.output}")


def _as_row(one: Evaluation) -> reproduction.Measured:
    low, high = one.measured.interval
    return reproduction.Measured(
        one.trained.source,
        reproduction.matching(one.trained.model),
        100 * (1 - one.measured.accuracy),
        (100 * (1 - high), 100 * (1 - low)),
        one.measured.images,
    )
