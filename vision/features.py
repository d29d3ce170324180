"""Feature maps of a Big-Little network at strides 2, 4, 8, 16 and 32, for detection and the like.

Which tensor is "stage i"? A plain network's stage strides where it begins, so that its output is
the map at its own resolution. A Big-Little module strides where it ends, in its fusion block: the
modules of bL-ResNet-50 put out maps at strides 8, 16, 16 and 32, and none at 4. What a detector
expects is the deepest map at each resolution (Lin et al., "Feature Pyramid Networks", 2017), and
that is
- where a stage's fusion block strides: what goes into it, the merged branches (C channels, after
  the ReLU of the merge);
- everywhere else (the module before the last stage, the last stage, every plain network): the
  stage's output.
So the stages give C channels at strides 4, 8, 16 and 32 as the plain network's do, and a map of an
image of H x W pixels has ceil(H / stride) x ceil(W / stride) elements, odd sizes included. Before
them comes level 0: the stem's first convolution with its normalisation and ReLU, at stride 2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from blnet.blocks import is_strided
from blnet.module import BigLittleModule
from blnet.network import BigLittleConfig, BigLittleNet

Layer = Callable[[Tensor], Tensor]


def feature_maps(
    stem: nn.Module,
    stages: Iterable[nn.Module],
    x: Tensor,
    run: Callable[[Layer, Tensor], Tensor] = lambda layer, x: layer(x),
    last: int | None = None,
) -> list[Tensor]:
    """Return the map of each level, highest resolution first.

    Args:
        stem: a `BigLittleNet`'s stem.
        stages: its stages, or the first ones of them.
        x: images (N, in_channels, H, W).
        run: calls a layer, or a part of one; gradient checkpointing is such a way to call.
        last: the last level wanted, what is behind it is not run; None for all.

    Returns:
        Level 0 (N, stem_width, H / 2, W / 2), then one map (N, C, H / s, W / s) for each stage,
        sizes rounded up; s is 4, 8, 16, 32. With the stem "small" every s is a quarter of that,
        and level 0 has the image's size. The last stage's map is what `forward_features` returns.
    """
    maps = []
    for name, layer in stem.named_children():
        x = layer(x)
        if name == "relu":
            maps.append(x)
            if last == 0:
                return maps
    for level, stage in enumerate(stages, start=1):
        fusion = _striding_fusion(stage)
        x = run(stage if fusion is None else cast("BigLittleModule", stage).merged, x)
        maps.append(x)
        if level == last:
            break
        if fusion is not None:
            x = run(fusion, x)
    return maps


def feature_info(config: BigLittleConfig) -> list[dict[str, Any]]:
    """Return what `feature_maps` gives, level by level, in the form that timm's tools read.

    Returns:
        A dict a level: `num_chs` channels, `reduction` how many times smaller than the image,
        `module` and `hook_type` the layer whose output ("forward") or input ("forward_pre") it is.
    """
    stem = 1 if config.stem == "small" else 2
    levels = [_level(config.stem_width, stem, "stem.relu")]
    last = len(config.widths) - 1
    for index, width in enumerate(config.widths):
        reduction = stem * stem * 2**index
        strides = config.branches > 1 and index < last - 1
        if strides:
            levels.append(_level(width, reduction, f"stages.{index}.fusion", "forward_pre"))
        else:
            levels.append(_level(width, reduction, f"stages.{index}"))
    return levels


def take_levels(count: int, indices: int | Sequence[int] | None) -> list[int]:
    """Return the levels that timm's `out_indices` ask for, counted from 0.

    Args:
        count: how many levels there are.
        indices: numbers, below 0 from the last; or how many of the last ones; None for all.

    Raises:
        ValueError: if there is no such level, or none is asked for.
    """
    if indices is None:
        return list(range(count))
    wanted = range(-indices, 0) if isinstance(indices, int) else list(indices)
    if not wanted or not all(-count <= level < count for level in wanted):
        raise ValueError(f"out_indices must name levels from 0 to {count - 1}, got {indices!r}")
    return [level % count for level in wanted]


def drop_after(model: BigLittleNet, last: int) -> None:
    """Take out, in place, the layers that no level up to the last one wanted needs.

    The classifier stays. `forward_features` then returns the map of that level.

    Args:
        model: the network.
        last: number of the last level wanted.
    """
    if last == 0 and hasattr(model.stem, "pool"):
        model.stem.pool = nn.Identity()
    model.stages = nn.Sequential(*list(model.stages)[:last])
    end = model.stages[-1] if last else None
    if end is not None and _striding_fusion(end) is not None:
        end.fusion = None  # type: ignore[assignment]  # a module without one ends in its merge


def _striding_fusion(stage: nn.Module) -> nn.Module | None:
    """Return a stage's fusion block if it shrinks the map."""
    fusion = stage.fusion if isinstance(stage, BigLittleModule) else None
    if fusion is None:
        return None
    convolutions = (part for part in fusion.modules() if isinstance(part, nn.Conv2d))
    return fusion if any(is_strided(conv.stride) for conv in convolutions) else None  # type: ignore[arg-type]


def _level(channels: int, reduction: int, module: str, hook: str = "forward") -> dict[str, Any]:
    return {"num_chs": channels, "reduction": reduction, "module": module, "hook_type": hook}
