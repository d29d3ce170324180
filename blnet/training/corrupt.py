"""Samples that cannot be read: counted, skipped, named, and an error where they are many."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from accelerate import Accelerator
from accelerate.utils import gather_object

from blnet.training.devices import by_first
from blnet.training.loading import Corrupt

MOST = 0.01  # share of the samples that may be corrupt
_NAMED = 20  # on the screen; the journal has them all
_Found = tuple[Corrupt, str, int]  # it, part of the data, samples of that part


class CorruptLog:
    """Keeps account of what could not be read.

    Args:
        unit: what a sample is called.
        accelerator: the devices; what one finds, the first one names.
        tell: prints a line.
        note: writes (name, reason) to the journal.
        known: names that were noted before.
    """

    def __init__(
        self,
        unit: str,
        accelerator: Accelerator,
        tell: Callable[[str], None],
        note: Callable[[str, str], None],
        known: Iterable[str] = (),
    ) -> None:
        self._unit = unit
        self._accelerator = accelerator
        self._tell = tell
        self._note = note
        self._named = set(known)
        # Two samples may have one name, as where a manifest lists a file twice.
        self._counted: dict[str, set[tuple[str, int | None]]] = {}
        self._new: list[_Found] = []
        self._shown = 0

    def add(self, found: Iterable[Corrupt], part: str, samples: int) -> None:
        """Note what could not be read; a process alone shares it at once.

        Args:
            found: each of them.
            part: of the data, "training" or "evaluation".
            samples: how many samples that part has.

        Raises:
            ValueError: if more than 1 % of the part is corrupt.
        """
        counted = self._counted.setdefault(part, set())
        self._new += [(one, part, samples) for one in found if (one.name, one.place) not in counted]
        if self._accelerator.num_processes == 1:
            self.share()

    def share(self) -> None:
        """Count and name what is new, of all devices; they call this together.

        Raises:
            ValueError: if more than 1 % of a part is corrupt.
            OSError: if a name cannot be noted.
        """
        found, self._new = self._new, []
        if self._accelerator.num_processes > 1:
            found = gather_object(found)
        if not found:
            return
        by_first(lambda: self._name(found), self._accelerator)
        for one, part, _ in found:
            self._counted.setdefault(part, set()).add((one.name, one.place))
        for one, part, samples in found:
            count = len(self._counted[part])
            if count > MOST * samples:
                raise ValueError(
                    f"{count} of the {samples} {part} {self._unit} cannot be read, more than "
                    f"{MOST:.0%}, {one.name} among them ({one.reason}); mend or replace them "
                    "and go on with --resume auto, or remove them and begin anew"
                )

    @property
    def count(self) -> int:
        """How many there are, those included that were known; of all devices in the first."""
        return len(self._named)

    def _name(self, found: list[_Found]) -> None:
        for (name, why, _), _, _ in found:
            if name in self._named:
                continue
            self._named.add(name)
            self._note(name, why)
            self._shown += 1
            if self._shown <= _NAMED:
                self._tell(f"warning: skipped {name}, which cannot be read: {why}")
            elif self._shown == _NAMED + 1:
                self._tell("warning: skipped more that cannot be read, which are not named here")
