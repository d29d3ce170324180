"""`blnet.optimize` and its parts: folding, fused ops, engines, and the choice between them."""

from blnet.optimizing.network import OptimizedNetwork
from blnet.optimizing.optimize import optimize
from blnet.optimizing.report import Change, Report, Trial

__all__ = ["Change", "OptimizedNetwork", "Report", "Trial", "optimize"]
