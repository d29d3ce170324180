"""BigLittleNet: a stem, Big-Little modules, a plain last stage and a classifier."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args, get_type_hints

from torch import Tensor, nn

from blnet.blocks import BasicBlock, BlockFactory, Bottleneck, ResidualBlock
from blnet.checks import check_choice, check_count
from blnet.module import (
    BigLittleModule,
    check_branching,
    divide_width,
    make_stages,
)
from blnet.stem import BigLittleStem, PlainStem, SmallStem

BlockName = Literal["basic", "bottleneck"]
StemName = Literal["imagenet", "small"]


@dataclass(frozen=True)
class BigLittleConfig:
    """Everything that decides a network's shape; written into every checkpoint.

    Attributes:
        block: "bottleneck" (ResNet-50 and deeper) or "basic" (ResNet-18, -34).
        depths: blocks L of each stage, as the stages of the plain network have them.
        widths: channels C of each stage.
        alpha: how many times narrower each smaller branch is.
        beta: how many times shorter each smaller branch is.
        branches: number K of branches; 1 is the plain network.
        cardinality: groups of a bottleneck's 3x3 convolution at full width.
        base_width: width of a group in the first stage; 64 where cardinality is 1.
        se_reduction: reduction of the squeeze-excitation; 0 for none.
        stem: "imagenet" shrinks the image to a quarter, "small" keeps its size.
        stem_width: channels after the stem.
        in_channels: channels of the image.
        num_classes: classes; 0 leaves the classifier out.

    Raises:
        ValueError: if a value is of the wrong type or out of range, or the widths, groups or
            reductions do not come out as whole numbers.
    """

    block: BlockName = "bottleneck"
    depths: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (256, 512, 1024, 2048)
    alpha: int = 2
    beta: int = 4
    branches: int = 2
    cardinality: int = 1
    base_width: int = 64
    se_reduction: int = 0
    stem: StemName = "imagenet"
    stem_width: int = 64
    in_channels: int = 3
    num_classes: int = 1000

    def __post_init__(self) -> None:
        check_branching(self.alpha, self.beta, self.branches)
        check_choice("block", self.block, get_args(BlockName))
        check_choice("stem", self.stem, get_args(StemName))
        for name in ("depths", "widths"):
            values = getattr(self, name)
            if not isinstance(values, list | tuple):
                raise ValueError(f"{name} must be a list of whole numbers, got {values!r}")
            object.__setattr__(self, name, tuple(values))
            for value in values:
                check_count(f"each of {name}", value, 1)
        for name in ("cardinality", "base_width", "stem_width", "in_channels"):
            check_count(name, getattr(self, name), 1)
        for name in ("se_reduction", "num_classes"):
            check_count(name, getattr(self, name), 0)
        if len(self.depths) != len(self.widths) or not self.depths:
            raise ValueError(
                f"depths and widths must name the same stages, got {len(self.depths)} depths and "
                f"{len(self.widths)} widths; give one of each for every stage"
            )
        self._check_divisions()

    def _check_divisions(self) -> None:
        divisions = self.branches - 1
        narrow = self.alpha**divisions
        bottleneck = self.block == "bottleneck"
        for width in self.widths[:-1]:
            divide_width(width // 4 if bottleneck else width, self.alpha, divisions)
        if divisions and self.stem == "imagenet":
            divide_width(self.stem_width, self.alpha, 1)
        # Groups are as wide in every branch; a bottleneck without groups is narrower in the little.
        divisor = 1 if self.cardinality > 1 else narrow
        least = [*(width // divisor for width in self.widths[:-1]), self.widths[-1]]
        for width in least if bottleneck else ():
            if width // 4 * self.base_width < 64:
                raise ValueError(
                    f"base_width {self.base_width} leaves no channel inside a bottleneck of "
                    f"{width}; choose larger widths or a larger base_width"
                )
        if self.cardinality > 1 and (not bottleneck or self.cardinality % narrow):
            raise ValueError(
                f"cardinality {self.cardinality} needs bottleneck blocks and an alpha that divides "
                f"it, got block {self.block!r} and alpha {self.alpha} for {self.branches} branches"
            )
        narrowest = min(self.widths) // narrow
        if self.se_reduction > narrowest:
            raise ValueError(
                f"se_reduction {self.se_reduction} leaves no channel of the {narrowest} in the "
                "narrowest branch; choose a smaller reduction"
            )

    def to_json(self) -> str:
        """Return the configuration as JSON text; `from_json` gives an equal one back."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> BigLittleConfig:
        """Return the configuration that `to_json` wrote.

        Raises:
            ValueError: if the text is not a JSON object, or has a key or value that is not ours.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"the configuration is not JSON: {error}") from None
        if not isinstance(values, dict):
            raise ValueError(
                f"the configuration must be a JSON object, got {type(values).__name__}"
            )
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> BigLittleConfig:
        """Return the configuration with these fields; those left out keep their defaults.

        Raises:
            ValueError: if a key or a value is not ours.
        """
        known = get_type_hints(cls)
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(
                f"the configuration has no field {', '.join(unknown)}; the fields are "
                f"{', '.join(known)}"
            )
        return cls(**values)


def block_factory(config: BigLittleConfig) -> BlockFactory:
    """Return what makes the network's residual blocks.

    The plain network's shortcuts stride in their convolution, a Big-Little network's pool first.
    """
    pooled = config.branches > 1
    if config.block == "basic":
        return partial(BasicBlock, se_reduction=config.se_reduction, pooled_shortcut=pooled)
    return partial(
        Bottleneck,
        cardinality=config.cardinality,
        base_width=config.base_width,
        se_reduction=config.se_reduction,
        pooled_shortcut=pooled,
    )


def _make_stem(config: BigLittleConfig) -> nn.Module:
    if config.stem == "small":
        return SmallStem(config.in_channels, config.stem_width)
    if config.branches == 1:
        return PlainStem(config.in_channels, config.stem_width)
    return BigLittleStem(config.in_channels, config.stem_width, config.alpha)


class BigLittleNet(nn.Module):
    """A ResNet of Big-Little modules.

    All stages but the last are Big-Little modules; each shrinks the map in its fusion block, where
    the plain network would at the start of the next stage. The last stage is plain.

    Args:
        config: the network's shape.
    """

    def __init__(self, config: BigLittleConfig | None = None) -> None:
        super().__init__()
        self.config = config or BigLittleConfig()
        self.stem = _make_stem(self.config)
        self.stages = nn.Sequential(*self._make_stages())
        self.pool: nn.Module = nn.AdaptiveAvgPool2d(1)
        self.flatten: nn.Module = nn.Flatten()
        self.fc: nn.Module = self._make_classifier(self.config.num_classes)
        self.apply(initialise)

    def _make_stages(self) -> list[nn.Module]:
        config = self.config
        return make_stages(
            block_factory(config),
            config.stem_width,
            config.depths,
            config.widths,
            (1, *[2] * (len(config.depths) - 1)),
            alpha=config.alpha,
            beta=config.beta,
            branches=config.branches,
        )

    def _make_classifier(self, num_classes: int) -> nn.Module:
        width = self.config.widths[-1]
        return nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map (N, C, H / 32, W / 32) of images (N, in_channels, H, W)."""
        features: Tensor = self.stages(self.stem(x))
        return features

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (N, num_classes) of the last stage's map (N, C, H, W).

        Args:
            x: what `forward_features` returned.
            pre_logits: return what the classifier would get (N, C) instead.
        """
        pooled: Tensor = self.flatten(self.pool(x))
        return pooled if pre_logits else cast("Tensor", self.fc(pooled))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of images (N, in_channels, H, W)."""
        return self.forward_head(self.forward_features(x))

    def reset_classifier(self, num_classes: int) -> None:
        """Put a fresh classifier in the old one's place; the configuration then says so.

        Args:
            num_classes: classes; 0 leaves the classifier out.

        Raises:
            ValueError: if `num_classes` is no whole number of at least 0.
        """
        config = dataclasses.replace(self.config, num_classes=num_classes)
        like = next(self.parameters())
        fc = self._make_classifier(num_classes).to(device=like.device, dtype=like.dtype)
        self.config, self.fc = config, fc.train(self.training)

    @property
    def as_configured(self) -> bool:
        """Whether `BigLittleNet(config)` with the same weights computes the same."""
        return type(self) is BigLittleNet


def initialise(module: nn.Module) -> None:
    """Kaiming normal (fan-out) for convolutions; each block starts as its shortcut (paper)."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, ResidualBlock):
        # `apply` visits children first, so this is the last word on the weight.
        nn.init.zeros_(module.last_norm.get_parameter("weight"))


__all__ = ["BigLittleConfig", "BigLittleModule", "BigLittleNet", "block_factory"]
