"""Convolutional networks on a CPU, compiled from C++: an engine for `blnet.optimize`.

    from blnet.kernels.native import Builder, status
    builder = Builder((8, 3, 224, 224))         # compiles the library at its first use
    y = builder.conv(builder.input, weight, bias, stride=(2, 2), padding=(3, 3), relu=True)
    (out,) = builder.build([y])(images)

`blnet.optimizing.native` builds the program of a whole network.
"""

from blnet.kernels.native.arena import Map
from blnet.kernels.native.builder import Builder, Output, pixel_table
from blnet.kernels.native.library import NativeError, NativeStatus, status
from blnet.kernels.native.program import Program

__all__ = [
    "Builder",
    "Map",
    "NativeError",
    "NativeStatus",
    "Output",
    "Program",
    "pixel_table",
    "status",
]
