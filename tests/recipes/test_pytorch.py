"""The PyTorch snippet, executed: the groups, the optimizers, the start and the constants of our own runs."""

from __future__ import annotations

import pytest
import torch
from exported import by_parameter, content, exported, run
from torch import nn

from mupsweep.models import Multipliers
from mupsweep.recipes.formats import pytorch as snippet_of
from mupsweep.recipes.tensors import folded
from mupsweep.sweep import tensor_rules
from mupsweep.training import build

TOLERANCE = {
    "numbers": 1e-12,  # relative
    # of the distance walked:
    "fp32": 1e-4,  # torch's unfused kernels add in another order
    "bf16": 2e-2,  # Newton-Schulz of a batch of matrices rounds in another order, 2^-8 each
    "folded": 1e-6,  # relative, logits after some steps in float64; Newton-Schulz runs in bf16, on scaled gradients
    "std": 5.0,  # standard errors
}
CPU = torch.device("cpu")
OPTIMIZERS = ["adamw", "sgd", "muon", "muon_bernstein", "muon_kimi", "soap"]


def tokens(model: nn.Module, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    drawn = torch.randint(256, (2, 33), generator=torch.Generator().manual_seed(step))
    return drawn[:, :-1], drawn[:, 1:]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_its_groups_train_as_our_own_do(optimizer: str) -> None:
    spec = run(f"optimizer={optimizer}", "optimizer.weight_decay=0.1")
    export, snippet = exported("pytorch", spec)
    ours, theirs = build.build(spec, CPU), build.build(spec, CPU).network
    start = {name: p.detach().clone() for name, p in theirs.named_parameters()}
    members = snippet["optimizers"](theirs)
    assert bool(export.limits) == (optimizer == "soap")
    if "muon" not in optimizer:  # torch's takes another LR for the same step
        keys = ("lr", "weight_decay") if optimizer == "sgd" else ("lr", "weight_decay", "eps")
        twins = zip(ours.network.parameters(), theirs.parameters(), strict=True)
        expected, found = by_parameter(ours.optimizer.members, *keys), by_parameter(members, *keys)
        assert all(expected[a] == pytest.approx(found[b], rel=TOLERANCE["numbers"]) for a, b in twins)
    for step in range(0 if optimizer == "soap" else 3):  # its ranking of directions magnifies rounding
        x, y = tokens(theirs, step)
        ours.network(x, y).backward()
        theirs(x, y).backward()
        ours.optimizer.step(1.0)
        for member in members:
            member.step()
            member.zero_grad()
    near = TOLERANCE["bf16" if "muon" in optimizer else "fp32"]
    for (name, a), b in zip(ours.network.named_parameters(), theirs.parameters(), strict=True):
        assert (a - b).norm() <= near * (a - start[name]).norm(), name


def test_it_states_the_forward_constants_and_draws_the_start_of_our_network() -> None:
    spec = run("model.bias=true")
    _, snippet = exported("pytorch", spec)
    forward = tensor_rules.multipliers(spec.resolved, spec.size)
    stated = [snippet[key] for key in ("BLOCK_MULTIPLIER", "OUTPUT_MULTIPLIER", "ATTENTION_SCALE")]
    assert stated == [forward.block, forward.output, forward.attention] == [0.5, 0.25, 8**-0.5]
    assert snippet["CLIP_NORM"] == tensor_rules.clip_norm(spec.resolved)
    network = build.build(spec, CPU).network
    torch.manual_seed(0)
    snippet["initialise"](network)
    for row in tensor_rules.rules(spec.resolved, spec.size, spec.base_lr):
        values = network.get_parameter(row.name).detach()
        if row.init == "normal":
            error = row.init_std / (2 * values.numel()) ** 0.5
            assert float(values.std()) == pytest.approx(row.init_std, abs=TOLERANCE["std"] * error), row.name
        else:
            assert torch.equal(values, torch.full_like(values, float(row.init == "ones"))), row.name


def test_names_of_another_model_are_renamed_and_strange_ones_refused() -> None:
    _, snippet = exported("pytorch", run())
    network = nn.ModuleDict({"model": build.build(run(), CPU).network})
    (member,) = snippet["optimizers"](network, rename=lambda name: name.removeprefix("model."))
    assert sum(len(group["params"]) for group in member.param_groups) == len(list(network.parameters()))
    with pytest.raises(ValueError, match="give optimizers\\(\\) a rename"):
        snippet["optimizers"](network)
    network["more"] = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"no pattern fits \['more.bias', 'more.weight'\]"):
        snippet["optimizers"](network, rename=lambda name: name.removeprefix("model."))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon"])
def test_folded_multipliers_train_the_same_function(optimizer: str) -> None:
    """Weights that took up the constants behind them walk as the network with constants does."""
    spec = run(f"optimizer={optimizer}", "optimizer.weight_decay=0.1", "training.clip=null")
    recipe, limits = folded(content(spec))
    assert limits == []
    assert recipe["block_multiplier"] == recipe["output_multiplier"] == 1.0
    forward = tensor_rules.multipliers(spec.resolved, spec.size)
    space: dict = {}
    exec(snippet_of.render(content(spec))[0], space)
    plain_space: dict = {}
    exec(snippet_of.render(recipe)[0], plain_space)
    with_constants = build.build(spec, CPU).network.double()
    plain = spec.resolved.model.network(spec.size, Multipliers(1.0, 1.0, forward.attention)).double()
    stds = [{row["name"]: row["init_std"] for row in side["tensors"]} for side in (content(spec), recipe)]
    with torch.no_grad():
        for name, p in plain.named_parameters():
            factor = stds[1][name] / stds[0][name] if stds[0][name] else 1.0
            p.copy_(with_constants.get_parameter(name) * factor)
    probe, _ = tokens(plain, 99)
    before = with_constants(probe)
    torch.testing.assert_close(plain(probe), before, rtol=TOLERANCE["folded"], atol=0)
    sides = [(with_constants, space["optimizers"](with_constants)), (plain, plain_space["optimizers"](plain))]
    for step in range(5):
        for network, members in sides:
            network(*tokens(network, step)).backward()
            for member in members:
                member.step()
                member.zero_grad()
    after = with_constants(probe)
    assert (after - before).abs().max() > 1e-3  # they did walk
    error = (plain(probe) - after).norm() / (after - before).norm()
    assert error < TOLERANCE["folded"]


def test_what_cannot_be_folded_is_said() -> None:
    tied, clipped, lion = run("model.tied=true"), run(), run("optimizer=lion")
    recipe, limits = folded(content(tied))
    assert "a tied head cannot take it up" in limits[0]
    assert (recipe["block_multiplier"], recipe["output_multiplier"]) == (
        1.0,
        0.25,
    )  # the branches are folded all the same
    stds = {row["name"]: row["init_std"] for row in recipe["tensors"]}
    assert stds["blocks.0.mlp.down.weight"] == pytest.approx(stds["blocks.0.attention.query.weight"] / 2, rel=1e-12)
    assert "clipping as it was swept (norm 1)" in folded(content(clipped))[1][0]
    recipe, limits = folded(content(lion))
    assert "Lion cannot take them up" in limits[0]
    assert recipe["block_multiplier"] == 0.5
    assert folded(content(run(width_ratio=1, depth_ratio=1)))[1] == []


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "soap"])
def test_lrs_of_groups_are_in_its_groups(optimizer: str) -> None:
    words = [f"optimizer={optimizer}", "optimizer.group_lr={input:4,attention:0.5}"]
    spec = run(*words)
    _, snippet = exported("pytorch", spec)
    theirs = build.build(spec, CPU).network
    found = {p: keys["lr"] for p, keys in by_parameter(snippet["optimizers"](theirs), "lr").items()}
    lrs = {name: found[p] for name, p in theirs.named_parameters()}
    _, snippet = exported("pytorch", run(words[0]))
    found = {p: keys["lr"] for p, keys in by_parameter(snippet["optimizers"](theirs), "lr").items()}
    factors = {name: lrs[name] / found[p] for name, p in theirs.named_parameters()}
    for name, factor in factors.items():
        expected = 4.0 if "embedding" in name else 0.5 if ".attention." in name else 1.0
        assert factor == pytest.approx(expected, rel=TOLERANCE["numbers"]), name
