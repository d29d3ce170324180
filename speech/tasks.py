"""The tasks by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from blnet.speech.config import SpeechConfig, TaskName
from blnet.speech.data import SpeechData
from blnet.speech.recordings import Utterance
from blnet.speech.task import SpeechTask
from blnet.speech.task_ctc import CtcTask
from blnet.speech.task_frame import FrameTask
from blnet.speech.task_keyword import KeywordTask

TASKS: dict[TaskName, type[SpeechTask]] = {
    "keyword": KeywordTask,
    "ctc": CtcTask,
    "frame": FrameTask,
}


def make_target(config: SpeechConfig) -> Callable[[Utterance], Tensor] | None:
    """Return what makes a recording's target in the task of a configuration; None for its class.

    Raises:
        ValueError: if settings do not fit together.
        OSError: if frame labels are not there.
    """
    return TASKS[config.task].target_of(config)


def make_task(config: SpeechConfig, data: SpeechData | None = None) -> SpeechTask:
    """Return the task of a configuration.

    Args:
        config: task, model, data, features and augmentation.
        data: what `load_data` gave for it; None loads it.

    Raises:
        ValueError: if settings do not fit together, or the recordings are not there.
    """
    return TASKS[config.task](config, data)
