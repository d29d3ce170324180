"""What the suites of single ops share: sites, passes, PyTorch's own ways beside ours, roofline.

A suite of an op says where a network uses it (its sites), how to make the tensors, what PyTorch's
users would write and what must be moved and multiplied; everything else is here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from blnet.bench.measure import Call, Group, Implementation
from blnet.bench.memory import tensor_bytes
from blnet.bench.roofline import measure_ceilings
from blnet.bench.session import Case, Session
from blnet.bench.settings import Settings
from blnet.optimizing.engines import compiled
from blnet.optimizing.graphs import captured_where_made

REFERENCE = "the same in float64"
Function = Callable[..., Any]


class Site(Protocol):
    """Where a network uses an op."""

    @property
    def label(self) -> str:
        """What tables call it."""


S = TypeVar("S", bound=Site)


@dataclass(frozen=True)
class Pass(Generic[S]):
    """One thing that is timed of an op.

    Attributes:
        name: what tables call it.
        kind: "inference" runs it without autograd, "forward" with what backward needs saved,
            "backward" the gradients of a result that is there, "both" one after the other.
        plain: what PyTorch's users write, from the suite's tensors.
        ours: the op.
        cost: bytes that must be moved and FLOPs, from a site and the suite's tensors.
    """

    name: str
    kind: str
    plain: Function
    ours: Function
    cost: Callable[[S, Sequence[Tensor | None]], tuple[int, int]]


@dataclass(frozen=True)
class Way:
    """One implementation.

    Attributes:
        name: what tables call it.
        description: one sentence on it.
        compile: options for torch.compile; None for none.
        devices: where it runs.
        quick: where it is part of a quick run.
    """

    name: str
    description: str
    compile: dict[str, Any] | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")
    quick: tuple[str, ...] = ("cpu", "cuda")

    @property
    def baseline(self) -> bool:
        """Whether it is one of PyTorch's own."""
        return self.name != OURS


OURS = "blnet"
WAYS = (
    Way("eager", "PyTorch's operations, one after the other."),
    Way("compile", "torch.compile of the same, which fuses what it can.", {}),
    Way(
        "compile, tuned",
        "torch.compile of the same, max-autotune.",
        {"mode": "max-autotune-no-cudagraphs"},
        devices=("cuda",),
        quick=(),  # it tries so many ways that a run of minutes would see the first suites only
    ),
    Way(OURS, "the op of blnet.kernels."),
)
CPU_NOTE = "on a CPU this is the plain PyTorch backend: the kernels are written for GPUs"
GRAPH_NOTE = "replayed as a CUDA graph"


@dataclass(frozen=True)
class OpSuite(Generic[S]):
    """The suite of one op.

    Attributes:
        name: of the op and of the suite.
        computes: the equation.
        sites: where bL-ResNet-50 uses it.
        quick_sites: those that a quick run takes: compiling for each takes seconds.
        passes: what is timed.
        tensors: makes the tensors of a site, all that the passes take, and how many of the first
            ones are differentiated; the last is the result's gradient.
        tolerances: largest relative error by dtype.
        rounds: rounds for one of a network's.
        counted: what the passes' costs are, where that is not what any implementation must move and
            multiply.
    """

    name: str
    computes: str
    sites: tuple[S, ...]
    quick_sites: tuple[S, ...]
    passes: tuple[Pass[S], ...]
    tensors: Callable[[S, Settings], tuple[list[Tensor | None], int]]
    tolerances: dict[str, float] = field(
        default_factory=lambda: {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
    )
    rounds: int = 4
    counted: str = ""

    def _sites(self, settings: Settings) -> tuple[S, ...]:
        return self.sites if settings.full else self.quick_sites

    def _ways(self, settings: Settings) -> list[Way]:
        """Return the implementations that a run takes."""
        device = settings.device
        return [w for w in WAYS if device in (w.devices if settings.full else w.quick)]

    def cases(self, settings: Settings) -> list[Case]:
        """Return every implementation of every pass at every site."""
        return [
            Case(group_name(site, what), site.label, way.name)
            for site in self._sites(settings)
            for what in self.passes
            for way in self._ways(settings)
        ]

    def build(self, group: str, session: Session) -> Group:
        """Return the implementations of one pass at one site."""
        settings = session.settings
        site, what = next(
            (site, what)
            for site in self._sites(settings)
            for what in self.passes
            if group_name(site, what) == group
        )
        measure_ceilings(session)
        batch = session.batch(self.name, group, settings.throughput_batch)
        tensors, leaves = self.tensors(site, replace(settings, batch=batch))
        wide = [t if t is None else t.double() for t in tensors]
        return Group(
            suite=self.name,
            name=group,
            implementations=[
                self._implementation(way, site, what, tensors, leaves, settings.graphs)
                for way in self._ways(settings)
            ],
            references={site.label: lambda: _run(what.kind, what.plain, wide, leaves)()},
            tolerance=self.tolerances[settings.dtype or "float32"],
            reference_text=REFERENCE,
            rounds=self.rounds * settings.rounds(settings.throughput_batch),
            budget=session.budget(self.name),
            covered=True,
        )

    def _implementation(
        self,
        way: Way,
        site: S,
        what: Pass[S],
        tensors: list[Tensor | None],
        leaves: int,
        graphs: bool,
    ) -> Implementation:
        function = what.plain if way.baseline else what.ours
        present = [t for t in tensors if t is not None]

        def make() -> Call:
            if way.compile is None:
                return _run(what.kind, function, tensors, leaves)
            # A retained graph is run again and again: its buffers must not be given away.
            with torch._functorch.config.patch(donated_buffer=False):
                call = _run(what.kind, function, tensors, leaves, way.compile)
                call()
            return call

        bytes_moved, flops = what.cost(site, tensors)
        on_cpu = present[0].device.type == "cpu"
        return Implementation(
            name=way.name,
            family=site.label,
            build=partial(captured_where_made, make) if graphs else make,
            description=way.description,
            facts={
                "computes": self.computes,
                "site": site.label,
                "pass": what.name,
                "batch": len(present[0]),
                "bytes": bytes_moved,
                "flops": flops,
                "baseline": way.baseline,
                **({"counted": self.counted} if self.counted else {}),
            },
            held_bytes=tensor_bytes(*present),
            compiles=way.compile is not None,
            note=CPU_NOTE if on_cpu and not way.baseline else GRAPH_NOTE if graphs else "",
        )


def group_name(site: Site, what: Pass[Any]) -> str:
    """Return the name of the group of a site and a pass."""
    return f"{site.label}, {what.name}"


def draw(settings: Settings) -> Callable[..., Tensor]:
    """Return what draws channels-last maps, and other tensors, of the run's seed and precision."""
    device = settings.device  # where billions of numbers take no time
    generator = torch.Generator(device).manual_seed(settings.seed)

    def make(*shape: int) -> Tensor:
        tensor = torch.randn(shape, generator=generator, device=device).to(settings.torch_dtype)
        if len(shape) == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    return make


def _run(
    kind: str,
    function: Function,
    tensors: Sequence[Tensor | None],
    leaves: int,
    compile_options: dict[str, Any] | None = None,
) -> Call:
    """Return a call that gives a pass's result: the op's, its gradients, or both.

    The last tensor is the gradient of the result and goes to autograd, not to the function.
    """
    differentiable = kind != "inference"
    leaf = [t if t is None else t.detach().requires_grad_(differentiable) for t in tensors[:leaves]]
    # What follows may be changed in place, as running statistics are: a copy for each.
    inputs = leaf + [t if t is None else t.clone() for t in tensors[leaves:-1]]
    wanted, gradient = [t for t in leaf if t is not None], tensors[-1]
    with torch.set_grad_enabled(differentiable):
        if compile_options is not None:
            # A function object of its own, so that nothing compiled for another site is found.
            plain = function
            function = compiled(lambda *args: plain(*args), tuple(inputs), **compile_options)
        made = function(*inputs) if kind == "backward" else None

    def forward() -> Tensor:
        with torch.set_grad_enabled(differentiable):
            return function(*inputs).detach()  # type: ignore[no-any-return]

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(made, wanted, gradient, retain_graph=True)  # type: ignore[arg-type]

    def both() -> list[Tensor]:
        with torch.enable_grad():  # whatever the caller's mode: capturing a CUDA graph is without
            out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, wanted, gradient)]

    return {"inference": forward, "forward": forward, "backward": backward, "both": both}[kind]
