"""Samples that cannot be read: counted, skipped, named, and an error where they are many."""

from __future__ import annotations

from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import gather_object

MOST = 0.01  # share of the samples that may be corrupt
_NAMED = 20  # on the screen; the journal has them all


class CorruptLog:
    """Keeps account of what could not be read.

    Args:
        unit: what a sample is called.
        accelerator: the devices; what one finds, the first one names.
        tell: prints a line.
        note: writes (name, reason) to the journal.
    """

    def __init__(
        self,
        unit: str,
        accelerator: Accelerator,
        tell: Callable[[str], None],
        note: Callable[[str, str], None],
    ) -> None:
        self._unit = unit
        self._accelerator = accelerator
        self._tell = tell
        self._note = note
        self._known: dict[str, dict[str, str]] = {}
        self._new: list[tuple[str, str, str, int]] = []

    def add(self, found: list[tuple[str, str]], part: str, samples: int) -> None:
        """Count what could not be read.

        Args:
            found: (name, reason) of each.
            part: of the data, "training" or "evaluation".
            samples: how many samples that part has.

        Raises:
            ValueError: if more than 1 % of the part is corrupt.
        """
        known = self._known.setdefault(part, {})
        for name, why in found:
            if name not in known:
                self._new.append((name, why, part, samples))
            self._count(name, why, part, samples)
        if self._accelerator.num_processes == 1:
            self.share()

    def share(self) -> None:
        """Name what is new, of all devices; they call this together.

        Raises:
            ValueError: if more than 1 % of a part is corrupt.
        """
        fresh, self._new = self._new, []
        if self._accelerator.num_processes > 1:
            fresh = gather_object(fresh)
        if self._accelerator.is_main_process:
            for number, (name, why, _, _) in enumerate(fresh):
                self._note(name, why)
                if number < _NAMED:
                    self._tell(f"warning: skipped {name}, which cannot be read: {why}")
            if len(fresh) > _NAMED:
                self._tell(f"warning: ... and {len(fresh) - _NAMED} more; metrics.jsonl has them")
        for name, why, part, samples in fresh:
            self._count(name, why, part, samples)

    def _count(self, name: str, why: str, part: str, samples: int) -> None:
        known = self._known.setdefault(part, {})
        known[name] = why
        if len(known) > MOST * samples:
            raise ValueError(
                f"{len(known)} of the {samples} {part} {self._unit} cannot be read, more than "
                f"{MOST:.0%}, {name} among them ({why}); mend or remove them"
            )
