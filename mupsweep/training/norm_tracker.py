"""Norms of every matrix of a run and of its updates, measured at some steps without a change to the training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mupsweep.scaling import Role, TensorSpec
from mupsweep.store.matrix_norms import MatrixNorm, columns
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training.build import TrainingSetup
from mupsweep.training.checkpoint import TrainState
from mupsweep.training.norms import rms_norm, rms_operator_norm


class NormTracker:
    """Measures the matrices of a run before and after the steps that `training.norm_points` asks for.

    Attributes:
        due: whether the present step is to be measured. A cooldown that branches off is not, since it logs no rows.
    """

    def __init__(self, run: RunSpec, setup: TrainingSetup) -> None:
        self.steps = run.resolved.training.norm_steps(run.resolved.steps)
        tensors = run.resolved.model.tensors(run.size) if self.steps else ()
        self.specs = [spec for spec in tensors if spec.role.is_matrix and spec.tied_to is None]
        self.network, self.sharded = setup.network, setup.sharded
        self.due = False
        self.before: dict[str, Tensor] = {}

    def before_step(self, state: TrainState) -> None:
        """Keep the matrices, in the memory of the CPU, since that of an accelerator may be full."""
        self.due = state.step + 1 in self.steps and not state.branching
        if self.due:
            self.before = {spec.name: weight.to("cpu", copy=True) for spec, weight in self._weights()}

    def after_step(self) -> dict[str, float | None]:
        """The columns that a step which is due has in metrics.jsonl; none of another step."""
        return columns(self._measured()) if self.due else {}

    def _measured(self) -> list[MatrixNorm]:
        """Every matrix, and how the step changed it."""
        norms = []
        for spec, weight in self._weights():
            if weight.device.type != "cuda":  # float64 is for CPUs and CUDA
                weight = weight.cpu()
            before = self.before.pop(spec.name).to(weight.device)
            start, change = matrix_norm(before, spec), matrix_norm(weight - before, spec)
            relative = change / start if start and change is not None else None
            norms.append(MatrixNorm(spec.role.value, spec.name, matrix_norm(weight, spec), relative))
        return norms

    def _weights(self) -> Iterator[tuple[TensorSpec, Tensor]]:
        """The matrices one by one, as the network holds them, or as it would without other ranks."""
        for spec in self.specs:
            weight = self.network.get_parameter(spec.name).detach()
            yield spec, weight.full_tensor() if self.sharded else weight  # type: ignore[attr-defined]


def matrix_norm(stored: Tensor, spec: TensorSpec) -> float | None:
    """||W||_R of a tensor of the network, or of its change; None where an entry is not finite.

    Of an embedding it is the RMS of the entries, since a token uses one column and n_in counts as 1.
    """
    if not torch.isfinite(stored).all():
        return None
    if spec.role is Role.INPUT:
        return rms_norm(stored)
    return rms_operator_norm(_as_matrix(stored, spec.dims))


def _as_matrix(stored: Tensor, dims: Sequence[int]) -> Tensor:
    """A stored tensor as (n_out, n_in)."""
    if stored.ndim == 2:
        return stored if tuple(stored.shape) == tuple(dims) else stored.mT
    return stored.reshape(*dims, -1).flatten(1)
