"""Sophia against its closed form; its curvature against the exact Gauss-Newton diagonal; the runs it makes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from walking import REST, Moment, largest_error, walked

from mupsweep import data
from mupsweep.errors import ConfigError
from mupsweep.models import Multipliers
from mupsweep.models.loss import DRAWS, sample_labels
from mupsweep.models.nanogpt import NanoGPT
from mupsweep.optimizers.sophia import Sophia
from mupsweep.scaling import Role
from mupsweep.store.run_dir import RunDir
from mupsweep.sweep import config, plan, run_spec
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.sweep.tensor_rules import rules
from mupsweep.training import trainer
from mupsweep.training.build import TrainingSetup, build, generator
from mupsweep.training.session import ReplicaControl
from mupsweep.training.signals import StopSignal
from mupsweep.training.trainer import clip, observe_curvature

CLIPPED_STEPS = 60
TOLERANCE = {
    "closed form": 2e-6,  # relative to the distance walked, fp32 against float64
    "observation": 1e-4,  # relative to the largest entry, fp32: squares of gradients in another order
    "standard errors": 4.5,  # of an estimate's mean
    "trace": 0.05,  # relative, of an estimated Gauss-Newton trace over all samples
}
CPU = torch.device("cpu")
SAMPLES = 1500


def sophia(**keys: Any) -> Sophia:
    return Sophia(name="sophia", **keys)


def closed_form(w: Tensor, walk: Iterator[Moment], rho: float, every: int, decay: float) -> Tensor:
    """As the authors' code writes it, bs = 1, but with the observation before the step, as in the paper."""
    m, h = torch.zeros_like(w), torch.zeros_like(w)
    clipped = entries = 0
    for now in walk:
        if (now.step - 1) % every == 0:
            h = 0.99 * h + 0.01 * now.curvature**2
        m = 0.965 * m + 0.035 * now.grad
        ratio = (m.abs() / (rho * h + 1e-15)).clamp(max=1)
        w = w * (1 - now.lr * decay) - now.lr * m.sign() * ratio
        clipped, entries = clipped + int((ratio == 1).sum()), entries + ratio.numel()
    assert rho == 0.04 or 0.02 < clipped / entries < 0.98  # both branches count
    return w


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("every", [1, 3, 10])
@pytest.mark.parametrize("rho", [0.04, 10.0])
def test_sophia_is_its_closed_form(rho: float, every: int, decay: float) -> None:
    got = walked(sophia(rho=rho, hessian_every=every), decay)
    assert largest_error(got, partial(closed_form, rho=rho, every=every, decay=decay)) < TOLERANCE["closed form"]


# The estimate.


def toy() -> tuple[nn.Module, Tensor]:
    """A transformer with five tokens of vocabulary and confident predictions, and a batch of six tokens."""
    model = NanoGPT(name="toy", width=8, depth=1, head_dim=4, context=3)
    size = model.base.scaled(1.0, 1.0, 5)
    network = model.network(size, Multipliers(1.0, 1.5, 0.5))
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(torch.randn(p.shape, generator=draw) * 0.4)
    return network, torch.tensor([[0, 1, 2], [3, 4, 1]])


def squares(loss: Tensor, made: nn.Module) -> list[Tensor]:
    grads = torch.autograd.grad(loss, list(made.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g**2 for p, g in zip(made.parameters(), grads, strict=True)]


def exact_diagonal(made: nn.Module, inputs: Tensor) -> list[Tensor]:
    """Of the mean loss: sum_k p_k (d log p_k)^2 = diag(J^T (diag p - p p^T) J), averaged over tokens."""
    total = [torch.zeros_like(p) for p in made.parameters()]
    logs = made(inputs).log_softmax(-1).flatten(0, 1)
    for row in logs:
        for log_p in row:
            grads = torch.autograd.grad(log_p, list(made.parameters()), retain_graph=True, allow_unused=True)
            for t, g in zip(total, grads, strict=True):
                t += 0 if g is None else log_p.exp().detach() * g**2 / len(logs)
    return total


def test_squared_gradients_of_sampled_labels_average_to_the_gauss_newton_diagonal() -> None:
    made, inputs = toy()
    exact = exact_diagonal(made, inputs)
    draw = torch.Generator().manual_seed(1)
    mean, second = ([torch.zeros_like(p) for p in made.parameters()] for _ in range(2))
    traces = []
    for _ in range(SAMPLES):
        loss = made(inputs, draws=torch.randint(DRAWS, inputs.shape, generator=draw))
        values = squares(inputs.numel() ** 0.5 * loss, made)
        traces.append(sum(f.sum().item() for f in values))
        for f, a, b in zip(values, mean, second, strict=True):
            a += f / SAMPLES
            b += f**2 / SAMPLES
    for (name, _), e, a, b in zip(made.named_parameters(), exact, mean, second, strict=True):
        error = ((b - a**2).clamp(min=0) / SAMPLES).sqrt() + 1e-3 * e.max()
        assert e.sum() > 0, name
        assert ((a - e).abs() / error).max() < TOLERANCE["standard errors"], name
    trace = sum(e.sum().item() for e in exact)
    assert sum(traces) / SAMPLES == pytest.approx(trace, rel=TOLERANCE["trace"])


# The runs.


@cache
def run(*overrides: str) -> RunSpec:
    tiny = ["experiment=smoke", "training.precision=fp32", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-6]"]
    (made,) = plan.plan(config.load([*tiny, "optimizer=sophia", *overrides]))
    return made


INPUTS = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(0))


def curvatures(built: TrainingSetup) -> dict[str, Tensor]:
    """The h of every parameter that Sophia takes."""
    names = {id(p): name for name, p in built.network.named_parameters()}
    return {
        names[id(p)]: state["h"].clone()
        for member in built.optimizer.members
        for p, state in member.state.items()
        if "h" in state
    }


def observed(step: int, seed: int = 0, *overrides: str) -> dict[str, Tensor]:
    built = build(run(*overrides), CPU)
    observe_curvature(built.network, built, INPUTS, seed, step, "fp32")
    return curvatures(built)


def test_an_observation_is_that_of_labels_drawn_from_the_logits_and_is_never_clipped() -> None:
    built = build(run("training.clip=1e-6"), CPU)
    before = {name: p.detach().clone() for name, p in built.network.named_parameters()}
    observe_curvature(built.network, built, INPUTS, 5, 20, "fp32")
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in built.network.named_parameters())

    again = build(run(), CPU).network
    logits = again(INPUTS).flatten(0, 1)
    draws = torch.randint(DRAWS, INPUTS.shape, generator=generator("curvature", 5, 20)).flatten()
    labels = sample_labels(torch.eye(len(logits)), logits.detach().T.contiguous(), draws)
    (len(labels) ** 0.5 * F.cross_entropy(logits, labels)).backward()
    curvature = curvatures(built)
    assert curvature.keys() == before.keys()
    for name, p in again.named_parameters():
        assert p.grad is not None
        expected = 0.01 * p.grad**2
        assert (curvature[name] - expected).abs().max() < TOLERANCE["observation"] * expected.max(), name


def test_the_labels_depend_on_the_seed_and_the_step_alone() -> None:
    """The same everywhere for one step of one run, other labels for another."""
    torch.manual_seed(1)
    one = observed(20)
    torch.manual_seed(2)
    again = observed(20)
    assert all(torch.equal(one[name], again[name]) for name in one)
    for other in (observed(10), observed(20, 1)):
        assert not torch.equal(one["head.weight"], other["head.weight"])


def test_the_curvature_is_observed_at_the_first_step_and_every_kth_from_there() -> None:
    due = build(run("optimizer.hessian_every=4"), CPU).optimizer.curvature_due
    assert [step for step in range(12) if due(step)] == [0, 4, 8]
    never = build(run("optimizer=adamw"), CPU).optimizer.curvature_due
    assert not any(never(step) for step in range(12))


def test_in_a_hybrid_only_sophia_observes_and_every_gradient_is_forgotten() -> None:
    overrides = ("optimizer=muon", "optimizer.rest=sophia", "optimizer.rest.hessian_every=4")
    built = build(run(*overrides), CPU)
    assert [step for step in range(9) if built.optimizer.curvature_due(step)] == [0, 4, 8]
    observe_curvature(built.network, built, INPUTS, 0, 4, "fp32")
    assert all(p.grad is None for p in built.network.parameters())
    curvature = curvatures(built)
    roles = {t.name: t.role for t in run(*overrides).resolved.model.tensors(run(*overrides).size)}
    assert set(curvature) == {name for name, role in roles.items() if role is not Role.HIDDEN}
    assert all(h.max() > 0 for h in curvature.values())


@pytest.mark.parametrize("batch", ["new", "step"])
def test_an_observation_sees_a_batch_of_its_own_or_that_of_its_step(
    batch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, Tensor] = {}
    observe = trainer.observe_curvature

    def noted(network: nn.Module, setup: TrainingSetup, inputs: Tensor, seed: int, step: int, *rest: Any) -> None:
        seen[step] = inputs
        observe(network, setup, inputs, seed, step, *rest)

    monkeypatch.setattr(trainer, "observe_curvature", noted)
    spec = run(f"optimizer.curvature_batch={batch}", "optimizer.hessian_every=2", "training.steps=4")
    corpus, training = data.prepare(spec.resolved.variant.data), spec.resolved.training
    trainer.train(spec, build(spec, CPU), corpus, RunDir(tmp_path), CPU, ReplicaControl(StopSignal()))
    assert sorted(seen) == [0, 2]
    for step, inputs in seen.items():
        trained_on, own = (
            torch.from_numpy(corpus.train_batch(spec.size.context, training.batch_size, seed, step))[:, :-1]
            for seed in (spec.seed, ~spec.seed)
        )
        assert not torch.equal(trained_on, own)
        assert torch.equal(inputs, own if batch == "new" else trained_on)


# The rule of rho.


@pytest.mark.parametrize(("rule", "hidden", "others"), [("gradient", 4.0 * 2.0, 4.0), ("constant", 1.0, 1.0)])
def test_rho_is_one_over_the_gradient_or_constant(rule: str, hidden: float, others: float) -> None:
    overrides = ["optimizer=sophia", f"optimizer.rho_rule={rule}", "parametrization=spectral", "optimizer.rho=0.05"]
    resolved = run_spec.resolve(config.load(overrides).variants[0])
    for row in rules(resolved, resolved.size(4.0, 2.0), 1.0):
        in_block = row.role in (Role.HIDDEN, Role.HIDDEN_VECTOR)
        assert row.thresholds["rho"] == pytest.approx(0.05 * (hidden if in_block else others), rel=1e-12), row.name
    assert all(row.thresholds == {"rho": 0.05} for row in rules(resolved, resolved.size(1.0, 1.0), 1.0))


@pytest.mark.parametrize("rule", ["gradient", "constant"])
def test_the_gradient_rule_keeps_the_clipped_fraction_and_the_constant_one_does_not(rule: str) -> None:
    """Gradients a quarter as large, as at four times the width, with the rho of that size."""
    found = []
    for scale, rho in ((1.0, 0.04), (0.25, 0.16 if rule == "gradient" else 0.04)):
        draw = torch.Generator().manual_seed(0)
        p = torch.nn.Parameter(torch.zeros(64, 64))
        optimizer = sophia().build([{"params": [p], "lr": 1.0, "weight_decay": 0.0, "eps": 1e-15, "rho": rho}])
        before = p.detach().clone()
        for _ in range(3):
            p.grad = 100 * scale * torch.randn(64, 64, generator=draw)
            optimizer.observe()  # pyright: ignore[reportAttributeAccessIssue]
            p.grad = 100 * scale * torch.randn(64, 64, generator=draw)
            before = p.detach().clone()
            optimizer.step()
        found.append(((p.detach() - before).abs() > 0.999).float().mean().item())
    assert 0.1 < found[0] < 0.9
    assert (found[0] == found[1]) == (rule == "gradient")
    assert found[1] >= found[0]


def test_clipping_by_norm_is_on_for_the_steps() -> None:
    built = build(run("training.clip=0.5"), CPU)
    built.network(INPUTS, INPUTS).backward()
    norm = clip(built)
    assert norm is not None
    assert math.isclose(sum(p.grad.square().sum().item() for p in built.network.parameters()), 0.25, rel_tol=1e-4)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"betas": (0.965, 1.0)}, r"optimizer.betas=\[0.965, 1.0\]"),
        ({"rho": 0.0}, "optimizer.rho=0.0: expected a positive number"),
        ({"eps": 0.0}, "optimizer.eps=0.0: expected above 0"),
        ({"hessian_every": 0}, "optimizer.hessian_every=0: expected at least 1"),
        ({"curvature_batch": "own"}, "optimizer.curvature_batch=own"),
        ({"rho_rule": "gradients"}, "optimizer.rho_rule=gradients.*gradient"),
    ],
)
def test_a_bad_setting_is_refused_with_its_key_and_value(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sophia(**keys)


def test_a_graft_of_sophia_is_refused() -> None:
    graft = {"name": "sophia", "kind": "mupsweep.optimizers.sophia.Sophia"}
    with pytest.raises(ConfigError, match=r"optimizer\.graft=sophia: a graft observes no curvature"):
        sophia(roles=("hidden",), rest=REST, graft=graft)


# How much is clipped.


@pytest.mark.parametrize(("rho", "low", "high"), [(0.04, 0.98, 1.0), (0.4, 0.9, 0.98), (4.0, 0.5, 0.9)])
def test_the_clipped_share_of_entries_follows_rho(
    rho: float, low: float, high: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the first steps of the demo's model at depth 2: the authors' 0.04 clips all but 2 %."""
    shares: list[float] = []
    direction = Sophia.direction

    def counted(self: Sophia, grads: Tensor, state: dict[str, Tensor], now: Any) -> Tensor:
        update = direction(self, grads, state, now)
        moved = update[update != 0]  # not the rows of tokens that were never seen
        if now.step > CLIPPED_STEPS // 2:
            shares.append(float((moved.abs() == 1).double().mean()))
        return update

    monkeypatch.setattr(Sophia, "direction", counted)
    words = ["experiment=demo", "model.depth=2", "optimizer=sophia", f"optimizer.rho={rho}", "parametrization=mup"]
    words += ["model.init_std=0.06", "training.batch_size=4"]
    grid = ["sweep.search=grid", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-9]", "sweep.seeds=[0]"]
    (spec,) = plan.plan(config.load([*words, *grid]))
    setup, corpus = build(spec, CPU), data.prepare(spec.resolved.variant.data)
    for step in range(CLIPPED_STEPS):
        batch = torch.from_numpy(corpus.train_batch(spec.size.context, 4, spec.seed, step))
        x, y = batch[:, :-1], batch[:, 1:]
        if setup.optimizer.curvature_due(step):
            observe_curvature(setup.network, setup, x, spec.seed, step, "fp32")
        setup.network(x, y).backward()
        clip(setup)
        setup.optimizer.step(min(1.0, step / 10))
    assert low < sum(shares) / len(shares) < high, sum(shares) / len(shares)
