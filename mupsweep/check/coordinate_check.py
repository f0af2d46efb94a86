"""The coordinate check of configs: networks and steps are those that `mupsweep run` would train with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from mupsweep import data
from mupsweep.check.exponents import DEPTH, WIDTH, Coordinates, Point, expected_exponents, family, fit
from mupsweep.check.measure import CHANGE, LOGITS, Matrix, Probe, Values, measure
from mupsweep.errors import ConfigError
from mupsweep.scaling import Role
from mupsweep.scaling.solve import folded_constant
from mupsweep.sweep import config
from mupsweep.sweep.compose import choices, compose
from mupsweep.sweep.config import GRID, GridConfig, SweepConfig, Variant
from mupsweep.sweep.plan import plan
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import trainer
from mupsweep.training.build import build

STEPS = (2, 5, 10)  # counts after which it is measured; after one step a head of zeros has moved nothing else
PROBE_SEQUENCES = 4
LOWEST, HIGHEST = -16, 6  # log2 of the LRs that are tried
MOVED = 0.5  # RMS change of the logits that makes an LR large enough to measure with
CPU = torch.device("cpu")


def load(overrides: Sequence[str], config_dir: str | None) -> SweepConfig:
    """The config of a check: that of `experiment=check` where no other is named, SP beside what is asked for."""
    overrides = list(overrides)
    if not any(override.startswith("experiment=") for override in overrides):
        models = [override for override in overrides if override.startswith("model=")]
        sections = [
            compose([f"model={name}"], config_dir)["model"]
            for name in _names(models)
            if name in choices("model", config_dir)
        ]
        draws_itself = any("init_std" not in section for section in sections)  # which experiment=check sets
        overrides.append("experiment=check_own" if draws_itself else "experiment=check")
    asked = [override for override in overrides if override.startswith("parametrization=")]
    names = _names(asked) or ["spectral"]
    others = [override for override in overrides if override not in asked]
    return config.load([*others, "parametrization=" + ",".join(dict.fromkeys(["sp", *names]))], config_dir)


def _names(overrides: Sequence[str]) -> list[str]:
    """The choices of a group that the last of some overrides names."""
    return overrides[-1].partition("=")[2].split(",") if overrides else []


def check(sweep_config: SweepConfig) -> Iterator[Coordinates]:
    """The coordinates of every variant along the widths and along the depths of the grid.

    The base LR is the middle one of `sweep.log2_lrs` where that is among the overrides, else one found at the base.

    Raises:
        ConfigError: a ladder of two sizes, or none.
    """
    use_threads(sweep_config)
    given = any(override.startswith("sweep.log2_lrs=") for override in sweep_config.overrides)
    base_log2_lr: dict[tuple[str, str], float] = {}
    for variant in [variant for variant in sweep_config.variants if variant.change is None]:
        # the LR is that of the base shape, where all parametrizations are one
        label = variant.names[:2]
        if label not in base_log2_lr:
            lrs = sorted(sweep_config.sweep.of(variant.optimizer).log2_lrs)
            base_log2_lr[label] = lrs[len(lrs) // 2] if given else suitable_log2_lr(variant)
        yield coordinates_of(variant, sweep_config.sweep, base_log2_lr[label])


def use_threads(sweep_config: SweepConfig) -> None:
    """As many as a worker would: on models this small several threads mostly wait for one another."""
    torch.set_num_threads(sweep_config.launcher_options.threads)


def coordinates_of(variant: Variant, grid: GridConfig, log2_lr: float) -> Coordinates:
    """One variant along both ladders, each at ratio 1 of the other axis."""
    traced: dict[str, dict[int, Values]] = {}
    points: list[Point] = []
    ladders = {
        WIDTH: replace(grid, depth_ratios=(1.0,), log2_lrs=(log2_lr,), pair=False, sizes=None),
        DEPTH: replace(grid, width_ratios=(1.0,), log2_lrs=(log2_lr,), pair=False, sizes=None),
    }
    ratios = {WIDTH: grid.width_ratios, DEPTH: grid.depth_ratios}
    if all(len(r) == 1 for r in ratios.values()):
        raise ConfigError("one width and one depth: give sweep.width_ratios=[1,2,4,8] or sweep.depth_ratios=[1,2,4,8]")
    runs: list[RunSpec] = []
    for axis, ladder in ladders.items():
        if len(ratios[axis]) == 1:
            continue
        runs = runs_of(variant, ladder)
        for run in runs:
            if run.run_id not in traced:
                traced[run.run_id] = measure(subject(run), STEPS)
            points.append(Point(axis, getattr(run.size, axis), run.seed, traced[run.run_id]))
    parametrization = runs[0].resolved.parametrization
    roles = {family(t.name): t.role for t in runs[0].resolved.model.tensors(runs[0].size)}
    promised = {axis: expected_exponents(parametrization, axis) for axis in ladders}
    return fit(variant.names, log2_lr, points, roles, promised)


def runs_of(variant: Variant, grid: GridConfig) -> list[RunSpec]:
    """The runs of one variant over a grid, searched or not, with matrix products in fp32."""
    grid = replace(grid, search=GRID, max_flops=None)
    variant = replace(variant, training=replace(variant.training, precision="fp32"))
    return plan(SweepConfig(variants=(variant,), sweep=grid, launcher={}, tracker={}))


def subject(run: RunSpec) -> Probe:
    """A run's network with the steps that training it would take at its peak LR, on the batches it would see."""
    corpus = data.prepare(run.resolved.variant.data)
    built = build(run, CPU)
    training, context = run.resolved.training, run.size.context
    taken = iter(range(max(STEPS)))

    def step() -> None:
        count = next(taken)
        batch = torch.from_numpy(corpus.train_batch(context, training.batch_size, run.seed, count))
        if built.optimizer.curvature_due(count):
            new = built.optimizer.observes_new_batch
            observed = torch.from_numpy(trainer.curvature_batch(corpus, run, count)) if new else batch
            trainer.observe_curvature(built.network, built, observed[:, :-1], run.seed, count, training.precision)
        built.network(batch[:, :-1], batch[:, 1:]).backward()
        trainer.clip(built)
        built.optimizer.step(1.0)

    probe = torch.from_numpy(corpus.validation_batch(context, range(PROBE_SEQUENCES)))[:, :-1]
    roles = {t.name: t.role for t in run.resolved.model.tensors(run.size)}
    features = built.network.get_submodule(run.resolved.model.features(run.size))
    routers = [name.rpartition(".")[0] for name, role in roles.items() if role is Role.ROUTER]
    if run.resolved.model.inferred:
        routers = []  # what such a module returns is its author's choice
    modules = tuple(built.network.get_submodule(name) for name in routers)
    return Probe(built.network, step, features, (probe,), roles, _matrices(run), modules)


def _matrices(run: RunSpec) -> dict[str, Matrix]:
    """How the tensors of a model of somebody else's code are (n_out, n_in), without the constants they took up."""
    if not run.resolved.model.inferred:
        return {}
    matrices = {}
    for spec in run.resolved.model.tensors(run.size):
        constant = 1.0
        if spec.fold is not None:
            monomial = folded_constant(run.resolved.parametrization, spec.role, spec.fold)
            constant = monomial.at(run.size.width_ratio, run.size.depth_ratio)
        matrices[spec.name] = Matrix(spec.dims, len(spec.shape) == 2 and spec.shape != spec.dims, constant)
    return matrices


def suitable_log2_lr(variant: Variant) -> float:
    """The smallest whole log2 LR at which the last step leaves the logits of the base model changed by MOVED.

    Raises:
        ConfigError: no LR does.
    """
    for log2_lr in range(LOWEST, HIGHEST + 1):
        (run,) = runs_of(variant, GridConfig(log2_lrs=(float(log2_lr),)))
        last = max(STEPS)
        traced = measure(subject(run), (last,))
        if last in traced and traced[last][CHANGE + LOGITS, ""] >= MOVED:
            return float(log2_lr)
    raise ConfigError(
        f"no LR from 2^{LOWEST} to 2^{HIGHEST} changes the logits by {MOVED} in {max(STEPS)} steps: "
        "give one as sweep.log2_lrs=[-8]"
    )
