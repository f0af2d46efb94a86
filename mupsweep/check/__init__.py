"""Checks before a sweep: are coordinates stable along widths and depths, and is an update as large as its law says?

`mupsweep check` trains the models of a config for ten steps; `coordinates` does the same with a model and a training
step of your own; `mupsweep check law` measures an optimizer. A coordinate check that passes does not prove that LRs
transfer, which only a sweep can tell; one that fails says where the parametrization is broken.
"""

from mupsweep.check.custom_model import coordinates

__all__ = ["coordinates"]
