"""mupsweep: pick the learning rate of a model you cannot afford to sweep, and know how far to trust it."""

__version__ = "0.1.0"
