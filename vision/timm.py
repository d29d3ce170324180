"""The Big-Little networks in timm: `import blnet.vision.timm`, then timm's own functions make them.

    timm.create_model("bl_resnet50", alpha=2, beta=4)          # weights move to and from blnet's
    timm.create_model("bl_resnet50", features_only=True)       # maps at strides 4, 8, 16 and 32
    timm.list_models("bl_*")

The features are those of `blnet.vision.features`, whose docstring says which tensor is which
stage's. Levels are numbered as those of timm's ResNets are: 0 at stride 2, 1 to 4 at strides 4 to
32. Without `out_indices` features are levels 1 to 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from blnet import registry, vision
from blnet.checks import check_choice
from blnet.keys import misfits, state_dict_of
from blnet.network import BigLittleConfig, BigLittleNet
from blnet.official import load_official
from blnet.vision.features import Layer, drop_after, feature_info, feature_maps, take_levels
from blnet.vision.preprocessing import IMAGENET

try:
    from timm.layers import SelectAdaptivePool2d
    from timm.models import (
        build_model_with_cfg,
        generate_default_cfgs,
        is_model,
        model_entrypoint,
        register_model,
        resolve_pretrained_cfg,
    )
except ImportError as error:
    raise ImportError(
        "blnet.vision.timm needs timm; install it with: pip install 'blnet[train]'"
    ) from error

POOLS = ("avg", "max", "avgmax", "catavgmax", "")
FIRST_CONV, CLASSIFIER = "stem.conv1", "fc"
# What a network takes, and what timm's own functions take on the way to it.
OPTIONS = (
    *("alpha", "beta", "branches", "stem", "width"),
    *("num_classes", "in_chans", "global_pool", "drop_rate"),
)
_TIMMS_OPTIONS = (
    *("features_only", "out_indices", "feature_cls", "cache_dir"),
    *("pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args"),
)
# timm's training script passes these to every network; 0 asks for nothing.
_IGNORED_AT_ZERO = ("drop_path_rate", "drop_block_rate")
_DEFAULT_LEVELS = (1, 2, 3, 4)
# Not 99999, with which timm puts parameters into the group before.
_AFTER_ALL_BLOCKS = 9999


class TimmBigLittleNet(BigLittleNet):
    """A `BigLittleNet` with what timm's functions ask of a network; the same keys and logits.

    Args:
        config: the network's shape.
        drop_rate: share of the classifier's inputs that dropout silences in training.
        global_pool: "avg", "max", "avgmax", "catavgmax", or "" for none (without a classifier).

    Raises:
        ValueError: if a value is out of range.
    """

    def __init__(
        self,
        config: BigLittleConfig | None = None,
        drop_rate: float = 0.0,
        global_pool: str = "avg",
    ) -> None:
        if not isinstance(drop_rate, int | float) or not 0 <= drop_rate < 1:
            raise ValueError(f"drop_rate must be a number from 0 to below 1, got {drop_rate!r}")
        self.global_pool = "avg"
        super().__init__(config)
        self.drop_rate = drop_rate
        self.drop = nn.Dropout(drop_rate)
        self.grad_checkpointing = False
        self.feature_info = feature_info(self.config)
        self.num_features = self.config.widths[-1]
        if global_pool != "avg":
            self.reset_classifier(self.num_classes, global_pool)

    @property
    def num_classes(self) -> int:
        """Classes; 0 where there is no classifier."""
        return self.config.num_classes

    @property
    def in_chans(self) -> int:
        """Channels of the image."""
        return self.config.in_channels

    @property
    def head_hidden_size(self) -> int:
        """Numbers that the classifier gets of an image."""
        return self.num_features * (2 if self.global_pool == "catavgmax" else 1)

    @property
    def as_configured(self) -> bool:
        """Whether `BigLittleNet(config)` with the same weights computes the same."""
        return self.global_pool == "avg"

    def _make_classifier(self, num_classes: int) -> nn.Module:
        width = self.config.widths[-1] * (2 if self.global_pool == "catavgmax" else 1)
        return nn.Linear(width, num_classes) if num_classes else nn.Identity()

    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """Return the classifier, or its name."""
        return CLASSIFIER if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh classifier, and another pool if one is named, in the old ones' place.

        Args:
            num_classes: classes; 0 leaves the classifier out.
            global_pool: see the class; None keeps the pool.

        Raises:
            ValueError: if a value is out of range, or there are classes and no pool.
        """
        pool = self.global_pool if global_pool is None else global_pool
        check_choice("global_pool", pool, POOLS)
        if num_classes and not pool:
            raise ValueError(
                f"global_pool '' leaves a map that no classifier takes, got {num_classes} classes; "
                "give num_classes=0 with it"
            )
        before, self.global_pool = self.global_pool, pool
        try:
            super().reset_classifier(num_classes)
        except ValueError:
            self.global_pool = before
            raise
        self.pool, self.flatten = _make_pool(pool)

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last stage's map (N, C, H / 32, W / 32) of images (N, in_channels, H, W)."""
        if self.grad_checkpointing:
            return feature_maps(self.stem, self.stages, x, self._run)[-1]
        return super().forward_features(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits (N, num_classes) of the last stage's map (N, C, H, W).

        Args:
            x: what `forward_features` returned.
            pre_logits: return what the classifier would get (N, head_hidden_size) instead.
        """
        pooled: Tensor = self.drop(self.flatten(self.pool(x)))
        return pooled if pre_logits else self.fc(pooled)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the features of images (N, in_channels, H, W) at some levels, in the order asked.

        Args:
            x: the images.
            indices: levels wanted, below 0 from the last; a number for the last ones; None for all.
            norm: without effect: there is no normalisation after the last stage.
            stop_early: do not run what is behind the last level wanted.
            output_fmt: "NCHW", the only one.
            intermediates_only: return the features alone, without the last map before them.

        Raises:
            ValueError: if there is no such level, or the format is another.
        """
        check_choice("output_fmt", output_fmt, ("NCHW",))
        levels = take_levels(len(self.stages) + 1, indices)
        last = max(levels) if stop_early else None
        maps = feature_maps(self.stem, self.stages, x, self._run, last)
        taken = [maps[level] for level in levels]  # the order of timm's feature_info
        return taken if intermediates_only else (maps[-1], taken)

    def prune_intermediate_layers(
        self,
        indices: int | Sequence[int] = 1,
        prune_norm: bool = False,
        prune_head: bool = True,
    ) -> list[int]:
        """Take out the layers that no wanted level needs; return the levels' numbers.

        Args:
            indices: as of `forward_intermediates`.
            prune_norm: without effect: there is no normalisation after the last stage.
            prune_head: take the pool and the classifier out, too.

        Raises:
            ValueError: if there is no such level.
        """
        levels = take_levels(len(self.stages) + 1, indices)
        shortened = max(levels) < len(self.stages)
        if shortened:
            drop_after(self, max(levels))
            self.num_features = self.feature_info[max(levels)]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return levels

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only what goes from stage to stage for backward and compute the rest again.

        As with every network in timm, running statistics of BatchNorm then move twice a step.
        """
        self.grad_checkpointing = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return which parameters belong together, for learning rates that fall with depth.

        Blocks of the same number in branches side by side are one group; a module's expanding
        layers and its fusion block come behind its branches.

        Args:
            coarse: a group for each stage, not for each block.
        """
        fine = [
            (r"^stages\.(\d+)\.branches\.\d+\.(\d+)", None),
            (r"^stages\.(\d+)\.(?:expands|fusion)", (_AFTER_ALL_BLOCKS,)),
            (r"^stages\.(\d+)\.(\d+)", None),
        ]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    def _run(self, layer: Layer, x: Tensor) -> Tensor:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, x, use_reentrant=False)  # type: ignore[no-any-return]
        return layer(x)


def checkpoint_filter_fn(
    state_dict: Mapping[str, Tensor], model: TimmBigLittleNet
) -> dict[str, Tensor]:
    """Return weights under our keys: those of `blnet.save` as they are, the published ones renamed.

    timm itself fits the first convolution to other channels, and leaves the classifier out where
    the number of classes is another.

    Raises:
        ValueError: if they are of neither kind, or do not fit the network.
    """
    weights = state_dict_of(state_dict)
    if f"{FIRST_CONV}.weight" not in weights:
        weights = load_official(weights).state_dict()
    own, given = (
        {key: value for key, value in state.items() if not key.startswith((FIRST_CONV, CLASSIFIER))}
        for state in (model.state_dict(), weights)
    )
    told = misfits(own, given)
    if told:
        raise ValueError(
            f"the weights do not fit the network; {told}; give the name, alpha, beta and branches "
            "that they were trained with"
        )
    return weights


def _make_pool(name: str) -> tuple[nn.Module, nn.Module]:
    if not name:
        return nn.Identity(), nn.Identity()
    if name == "avg":
        return nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return SelectAdaptivePool2d(pool_type=name), nn.Flatten()


def _build(
    name: str,
    num_classes: int,
    in_chans: int,
    global_pool: str = "avg",
    drop_rate: float = 0.0,
    **shape: Any,
) -> TimmBigLittleNet:
    with torch.device("meta"):  # for its configuration: nothing is computed, nothing drawn
        twin = registry.build(name, num_classes=num_classes, in_channels=in_chans, **shape)
    assert isinstance(twin, BigLittleNet)
    return TimmBigLittleNet(twin.config, drop_rate, global_pool)


def _create(name: str, pretrained: bool, options: dict[str, Any]) -> nn.Module:
    for option in _IGNORED_AT_ZERO:
        if options.get(option) == 0:
            del options[option]
    unknown = [o for o in options if o not in OPTIONS and o not in _TIMMS_OPTIONS]
    if unknown:
        raise ValueError(
            f"{name} takes no option {', '.join(unknown)}; its options are {', '.join(OPTIONS)}"
        )
    if pretrained:
        _check_source(name, options.get("pretrained_cfg"), options.get("pretrained_cfg_overlay"))
    if options.get("features_only"):
        # The maps before a fusion block are no module's output, by which timm's other ways go.
        options.setdefault("feature_cls", "getter")
        check_choice("feature_cls", options["feature_cls"], ("getter", "hook"))
        take_levels(len(_DEFAULT_LEVELS) + 1, options.get("out_indices"))
    made: nn.Module = build_model_with_cfg(
        lambda **shape: _build(name, **shape),
        name,
        pretrained,
        feature_cfg={"out_indices": _DEFAULT_LEVELS},
        pretrained_filter_fn=checkpoint_filter_fn,
        **options,
    )
    return made


def _check_source(name: str, cfg: Any, overlay: Any) -> None:
    """Raise an error unless it is said where pretrained weights are to be had, and a file is one.

    Raises:
        ValueError: if it is not said; timm has none of these networks.
        FileNotFoundError: if the file does not exist.
    """
    found = resolve_pretrained_cfg(name, cfg, overlay)
    if not (found.has_weights or found.state_dict or found.source):
        raise ValueError(
            f"timm has no pretrained weights of {name}; load the published .pth file with "
            "blnet.load_official(FILE), or give pretrained_cfg_overlay=dict(file=FILE)"
        )
    if found.file and not Path(found.file).exists():
        raise FileNotFoundError(
            f"{found.file} does not exist; check the path in pretrained_cfg_overlay"
        )


def _default_cfg() -> dict[str, Any]:
    size = IMAGENET.size
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (IMAGENET.channels, size, size),
        "pool_size": (-(-size // 32), -(-size // 32)),
        "crop_pct": IMAGENET.crop_ratio,
        "interpolation": IMAGENET.interpolation,
        "mean": IMAGENET.mean,
        "std": IMAGENET.std,
        "first_conv": FIRST_CONV,
        "classifier": CLASSIFIER,
        "paper_ids": "arXiv:1807.03848",
        "paper_name": "Big-Little Net",
    }


def _register(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        return _create(name, pretrained, options)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"""Return {name} for timm; see `blnet.vision.{name}`.

    Args:
        pretrained: load the weights that `pretrained_cfg_overlay` names; timm has none itself.
        options: {", ".join(OPTIONS)}; features_only, out_indices.

    Raises:
        ValueError: if an option is unknown or out of range, or there are no such weights.
    """
    with warnings.catch_warnings():
        if is_model(name) and model_entrypoint(name).__module__ == __name__:
            warnings.simplefilter("ignore")  # this module was reloaded
        register_model(create)
    return create


# timm's `register_model` reads the first of these names and adds to the second.
default_cfgs = generate_default_cfgs({name: _default_cfg() for name in vision.__all__})
__all__ = ["TimmBigLittleNet", "checkpoint_filter_fn"]

bl_resnet18 = _register("bl_resnet18")
bl_resnet34 = _register("bl_resnet34")
bl_resnet50 = _register("bl_resnet50")
bl_resnet101 = _register("bl_resnet101")
bl_resnet152 = _register("bl_resnet152")
bl_resnext50_32x4d = _register("bl_resnext50_32x4d")
bl_resnext101_32x4d = _register("bl_resnext101_32x4d")
bl_resnext101_64x4d = _register("bl_resnext101_64x4d")
bl_seresnext50_32x4d = _register("bl_seresnext50_32x4d")
bl_seresnext101_32x4d = _register("bl_seresnext101_32x4d")
