"""What `blnet.optimize` did to a network, for `explain()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Change:
    """A layer that was replaced, or left as it is.

    Attributes:
        layer: its name within the network, "" for the network itself.
        was: what stood there.
        now: what became of it; empty where it was left as it is.
        reason: why it was left as it is; empty where it was replaced.
    """

    layer: str
    was: str
    now: str = ""
    reason: str = ""

    def __str__(self) -> str:
        """Say it in one line."""
        what = f"{self.layer or 'the network'} ({self.was})"
        return f"{what}: {self.now}" if self.now else f"{what}: left as it is, {self.reason}"


@dataclass(frozen=True)
class Trial:
    """An engine that was tried.

    Attributes:
        engine: its name.
        seconds: median time of a call; None if it got no time.
        note: why it got none, or why it was dropped; empty for one that ran to the end.
        error: norm of its difference to the original network's result over that result's norm.
        build_seconds: what building it took, and capturing it too where that is not told apart.
        late: whether time was what it lacked.
        capture_seconds: what capturing a CUDA graph took, where its engine was built before.
    """

    engine: str
    seconds: float | None = None
    note: str = ""
    error: float | None = None
    build_seconds: float | None = None
    late: bool = False
    capture_seconds: float | None = None

    def __str__(self) -> str:
        """Say it in one line."""
        if self.seconds is None:
            return f"{self.engine}: {self.note}"
        facts = [f"{self.seconds * 1e3:.2f} ms"]
        facts += [f"error {self.error:.1e}"] if self.error is not None else []
        took = {"built": self.build_seconds, "captured": self.capture_seconds}
        facts += [f"{how} in {time:.1f} s" for how, time in took.items() if time is not None]
        return f"{self.engine}: {', '.join(facts)}{f'; {self.note}' if self.note else ''}"


@dataclass
class Report:
    """What was done to a network.

    Attributes:
        network: name of its class.
        mode: "inference" or "train".
        device: where it runs.
        precision: what it computes in.
        engine: what runs it for the example's shape.
        inputs: the example's shapes; empty without one.
        otherwise: what happens to other inputs.
        changes: layer by layer.
        trials: the engines that were tried, in the order of trying.
        steps: what the engine made of the network, where it tells.
    """

    network: str
    mode: str
    device: str
    precision: str
    engine: str
    inputs: str = ""
    otherwise: str = ""
    changes: Sequence[Change] = ()
    trials: Sequence[Trial] = field(default_factory=list)
    steps: Sequence[str] = ()

    def __str__(self) -> str:
        """Say all of it, a line each."""
        head = f"{self.network}, {self.mode}, {self.precision} on {self.device}"
        lines = [f"{head}: {self.engine}" + (f" for {self.inputs}" if self.inputs else "")]
        lines += [f"other inputs: {self.otherwise}"] if self.otherwise else []
        done = [change for change in self.changes if change.now]
        left = [change for change in self.changes if not change.now]
        parts = (("engines", self.trials), ("replaced", done), ("left", left), ("runs", self.steps))
        for title, entries in parts:
            if entries:
                lines += [f"{title} ({len(entries)}):", *(f"  {entry}" for entry in entries)]
        return "\n".join(lines)
