"""The sizes that ops are tested with, and why. Used through ``blnet.kernels.testing``."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of a merge, and why they are tested.

    Attributes:
        n: batch.
        c: channels.
        h: height of little and of the output.
        w: width of little and of the output.
        h_big: height of big.
        w_big: width of big.
        reason: why this case exists.
    """

    n: int
    c: int
    h: int
    w: int
    h_big: int
    w_big: int
    reason: str

    @property
    def big(self) -> tuple[int, int, int, int]:
        """Shape of big."""
        return (self.n, self.c, self.h_big, self.w_big)

    @property
    def little(self) -> tuple[int, int, int, int]:
        """Shape of little."""
        return (self.n, self.c, self.h, self.w)

    def __str__(self) -> str:
        little = "x".join(str(size) for size in self.little)
        return f"{little} from {self.h_big}x{self.w_big}"


@dataclass(frozen=True)
class ExpandShape:
    """Sizes of an expand_merge, and why they are tested.

    Attributes:
        n: batch.
        k: channels of x.
        c: channels of the output.
        h: height of x and of the output.
        w: width of x and of the output.
        h_big: height of big; 0 for no big.
        w_big: width of big; 0 for no big.
        reason: why this case exists.
    """

    n: int
    k: int
    c: int
    h: int
    w: int
    h_big: int
    w_big: int
    reason: str

    @property
    def x(self) -> tuple[int, int, int, int]:
        """Shape of x."""
        return (self.n, self.k, self.h, self.w)

    @property
    def big(self) -> tuple[int, int, int, int] | None:
        """Shape of big, or None."""
        return (self.n, self.c, self.h_big, self.w_big) if self.h_big else None

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Shape of the output."""
        return (self.n, self.c, self.h, self.w)

    def __str__(self) -> str:
        x = "x".join(str(size) for size in self.x)
        big = f" from {self.h_big}x{self.w_big}" if self.h_big else ""
        return f"{x} to {self.c}{big}"


SHAPES = (
    Shape(2, 64, 8, 8, 4, 4, "doubling, as at every merge of a network at even sizes"),
    Shape(1, 48, 7, 9, 4, 5, "odd sizes next to doubling: ceil(H / 2), and C no power of two"),
    Shape(2, 32, 6, 5, 6, 5, "equal sizes: the plain residual add"),
    Shape(1, 1, 1, 1, 1, 1, "a single element"),
    Shape(3, 5, 1, 1, 1, 1, "one pixel: both layouts are the same memory"),
    Shape(1, 3, 40, 1, 20, 1, "speech: one time step, and unaligned channels"),
    Shape(2, 300, 4, 6, 2, 3, "more channels than the widest tile"),
    Shape(1, 16, 40, 40, 20, 20, "more pixels than a tile holds"),
    Shape(1, 8, 12, 12, 3, 4, "whole ratios 4 and 3 that differ between the axes"),
    Shape(1, 4, 20, 10, 2, 2, "ratios 10 and 5: above the largest that is compiled in"),
    Shape(2, 7, 10, 9, 4, 7, "ratios 5/2 and 9/7: windows of different sizes in one map"),
    Shape(2, 6, 13, 11, 1, 1, "one pixel copied everywhere: the window is the whole map"),
    Shape(1, 5, 3, 4, 7, 9, "big is larger: some of its pixels are never read, gradient 0"),
    Shape(1, 5, 6, 4, 3, 9, "up in one axis, down in the other"),
    Shape(2, 6, 8, 5, 4, 5, "up in one axis, equal in the other"),
    Shape(0, 8, 4, 4, 2, 2, "empty batch"),
    Shape(2, 0, 4, 4, 2, 2, "no channels"),
    Shape(2, 8, 0, 4, 2, 2, "no rows: big's gradient is zero, not uninitialised"),
)


EXPAND_SHAPES = (
    ExpandShape(2, 32, 64, 8, 8, 4, 4, "doubling, as at every merge of a network at even sizes"),
    ExpandShape(1, 48, 96, 7, 9, 4, 5, "odd sizes next to doubling, K and C no powers of two"),
    ExpandShape(2, 16, 32, 6, 5, 6, 5, "equal sizes: the residual of a bottleneck"),
    ExpandShape(2, 24, 40, 6, 7, 0, 0, "no big: convolution, BN and ReLU alone"),
    ExpandShape(9, 1, 1, 1, 1, 1, 1, "one channel, one pixel: both layouts are the same memory"),
    ExpandShape(1, 37, 75, 5, 7, 3, 4, "unaligned rows: narrow loads, smaller tiles"),
    ExpandShape(1, 130, 140, 9, 8, 5, 4, "K and C just above the widest tile"),
    ExpandShape(1, 8, 16, 40, 30, 20, 15, "more pixels than a share of the reductions holds"),
    ExpandShape(1, 4, 8, 12, 12, 3, 4, "whole ratios 4 and 3 that differ between the axes"),
    ExpandShape(2, 7, 9, 10, 9, 4, 7, "ratios 5/2 and 9/7: windows of different sizes in one map"),
    ExpandShape(1, 6, 5, 13, 11, 1, 1, "one pixel copied everywhere: the window is the whole map"),
    ExpandShape(1, 5, 6, 3, 4, 7, 9, "big is larger: some of its pixels are never read"),
    ExpandShape(1, 3, 12, 40, 1, 20, 1, "speech: one time step, and unaligned channels"),
    ExpandShape(0, 8, 16, 4, 4, 2, 2, "empty batch"),
)


@dataclass(frozen=True)
class BottleneckShape:
    """Sizes of a bottleneck, and why they are tested.

    Attributes:
        n: batch.
        k: channels of x.
        i: inner width.
        c: channels of the block's output.
        h: height of x and of the output.
        w: width of x and of the output.
        c_out: channels after the expansion; 0 for none.
        h_big: height of big; 0 for no big.
        w_big: width of big; 0 for no big.
        reason: why this case exists.
    """

    n: int
    k: int
    i: int
    c: int
    h: int
    w: int
    c_out: int
    h_big: int
    w_big: int
    reason: str

    @property
    def x(self) -> tuple[int, int, int, int]:
        """Shape of x."""
        return (self.n, self.k, self.h, self.w)

    @property
    def shortcut(self) -> tuple[int, int, int, int] | None:
        """Shape of the projected x; None where x itself is added."""
        return None if self.k == self.c else (self.n, self.c, self.h, self.w)

    @property
    def big(self) -> tuple[int, int, int, int] | None:
        """Shape of big, or None."""
        return (self.n, self.c_out, self.h_big, self.w_big) if self.h_big else None

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Shape of the output."""
        return (self.n, self.c_out or self.c, self.h, self.w)

    def __str__(self) -> str:
        x = "x".join(str(size) for size in self.x)
        chain = f" to {self.c_out}" if self.c_out else ""
        big = f" from {self.h_big}x{self.w_big}" if self.h_big else ""
        return f"{x} by {self.i} to {self.c}{chain}{big}"


@dataclass(frozen=True)
class StemShape:
    """Sizes of a stem's end, and why they are tested.

    Attributes:
        n: batch.
        c_x: channels of the map that the big branch convolves; 0 where big is given.
        c_little: channels of the map that the little branch convolves; 0 where it is given.
        narrow: width of the little branch.
        c: width of the big branch.
        c_out: channels of the output.
        h_in: height of what is convolved; the output's is half, rounded up.
        w_in: width of what is convolved.
        reason: why this case exists.
    """

    n: int
    c_x: int
    c_little: int
    narrow: int
    c: int
    c_out: int
    h_in: int
    w_in: int
    reason: str

    @property
    def out(self) -> tuple[int, int, int, int]:
        """Shape of the output."""
        return (self.n, self.c_out, (self.h_in + 1) // 2, (self.w_in + 1) // 2)

    def _map(self, convolved: int, given: int) -> tuple[int, int, int, int]:
        if convolved:
            return (self.n, convolved, self.h_in, self.w_in)
        return (self.n, given, *self.out[2:])

    @property
    def x(self) -> tuple[int, int, int, int]:
        """Shape of x: big, or what it is the convolution of."""
        return self._map(self.c_x, self.c)

    @property
    def little(self) -> tuple[int, int, int, int]:
        """Shape of little, or of what it is the convolution of."""
        return self._map(self.c_little, self.narrow)

    def __str__(self) -> str:
        x, little = ("x".join(str(size) for size in shape) for shape in (self.x, self.little))
        return f"{x} and {little} by {self.narrow} and {self.c} to {self.c_out}"


BOTTLENECK_SHAPES = (
    BottleneckShape(2, 32, 16, 32, 8, 8, 64, 4, 4, "the last little block, chained, doubling"),
    BottleneckShape(2, 48, 16, 64, 7, 6, 0, 0, 0, "projected shortcut, no expansion"),
    BottleneckShape(1, 48, 32, 48, 7, 9, 96, 4, 5, "chained, odd sizes, C no power of two"),
    BottleneckShape(1, 32, 16, 32, 6, 5, 48, 6, 5, "chained, big of equal size"),
    BottleneckShape(2, 16, 16, 16, 5, 6, 32, 0, 0, "chained, no big"),
    BottleneckShape(1, 16, 32, 80, 6, 7, 144, 2, 3, "chained and projected, ratios 3 and 7/3"),
    BottleneckShape(1, 32, 16, 32, 3, 4, 16, 5, 7, "chained, big is larger"),
    BottleneckShape(1, 256, 64, 256, 4, 5, 80, 2, 3, "the most channels that chain"),
    BottleneckShape(1, 64, 16, 272, 4, 3, 64, 2, 2, "too many channels to chain: three launches"),
    BottleneckShape(1, 37, 9, 37, 5, 7, 75, 3, 4, "unaligned rows, which do not chain"),
    BottleneckShape(1, 20, 8, 20, 9, 8, 0, 0, 0, "I = 8: half a tile"),
    BottleneckShape(1, 130, 128, 130, 4, 5, 0, 0, 0, "the widest I, C just above a tile"),
    BottleneckShape(1, 40, 101, 40, 5, 4, 56, 3, 2, "a wide, unaligned I: two blocks of K"),
    BottleneckShape(9, 4, 1, 4, 1, 1, 5, 1, 1, "one inner channel, one pixel: one tap in"),
    BottleneckShape(2, 16, 16, 16, 1, 9, 32, 1, 5, "one row"),
    BottleneckShape(1, 3, 5, 3, 40, 1, 12, 20, 1, "speech: one time step, unaligned channels"),
    BottleneckShape(1, 16, 16, 16, 20, 15, 16, 10, 8, "more pixels than a tile holds"),
    BottleneckShape(0, 16, 16, 16, 4, 4, 32, 2, 2, "empty batch"),
)


STEM_SHAPES = (
    StemShape(2, 32, 16, 16, 32, 32, 12, 12, "both convolutions, as in a network"),
    StemShape(1, 0, 0, 16, 32, 32, 13, 10, "both maps given: expansion, merge and fusion"),
    StemShape(1, 0, 16, 16, 48, 48, 11, 9, "big given, odd sizes, C no power of two"),
    StemShape(1, 16, 0, 32, 16, 16, 9, 12, "little given, odd and even"),
    StemShape(1, 48, 80, 48, 96, 112, 7, 8, "every width different, no power of two"),
    StemShape(1, 80, 96, 16, 32, 48, 6, 5, "several blocks of channels in the convolutions"),
    StemShape(1, 5, 3, 5, 9, 7, 9, 7, "unaligned rows: in parts"),
    StemShape(1, 3, 4, 70, 66, 5, 5, 4, "unaligned, several tiles of C"),
    StemShape(1, 16, 16, 128, 128, 144, 6, 7, "the widest L and C"),
    StemShape(9, 16, 32, 16, 16, 48, 1, 1, "one pixel: one tap inside"),
    StemShape(9, 1, 2, 1, 3, 5, 1, 1, "one channel and one pixel: both layouts are equal"),
    StemShape(2, 16, 16, 16, 16, 16, 1, 13, "one row"),
    StemShape(1, 3, 2, 5, 4, 4, 30, 1, "speech: one time step"),
    StemShape(1, 16, 16, 16, 16, 16, 30, 37, "more pixels than a tile holds"),
    StemShape(0, 16, 16, 16, 16, 16, 4, 4, "empty batch"),
)
