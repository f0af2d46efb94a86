"""Optimizers: one file each, with the exact algorithm of its paper and the update law that its rule follows from.

An optimizer is a dataclass whose fields are the keys of its yaml (`configs/optimizer/NAME.yaml`). It declares
`update_law()`, the roles it takes, and builds a `torch.optim.Optimizer` from parameter groups that already carry the
solved LR, weight decay and eps of every tensor.
"""

from mupsweep.optimizers.optimizer import Optimizer

__all__ = ["Optimizer"]
