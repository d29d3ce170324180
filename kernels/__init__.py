"""Fused ops of Big-Little networks."""
