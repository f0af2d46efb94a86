"""Models: a torch-free table of tensors with their roles, and a network built from that table.

A model is a dataclass whose fields are the keys of its yaml (`configs/model/NAME.yaml`). `tensors(size)` declares every
tensor once, with its name, shape, role and init; `network(size, multipliers)` assembles modules of those shapes. So
`plan` and `rules` describe a model without importing torch.
"""

from mupsweep.models.architecture import Architecture, Multipliers

__all__ = ["Architecture", "Multipliers"]
