"""The mixture of experts against NanoGPT, a forward pass written out, and what training in pieces must not change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny import network, resolve, scaled, tiny, tokens
from torch import Tensor, nn

from mupsweep import recipes
from mupsweep.errors import ConfigError
from mupsweep.models import Multipliers
from mupsweep.models.inference import infer
from mupsweep.models.layers import MixtureOfExperts, MoEDecoder
from mupsweep.models.moe import MoE
from mupsweep.models.nanogpt import NanoGPT
from mupsweep.models.shape import Size
from mupsweep.recipes import recipe
from mupsweep.scaling import Role
from mupsweep.sweep import tensor_rules
from mupsweep.training.build import build
from mupsweep.training.microbatch import MicroBatcher

TOLERANCE = {
    "float64": 1e-12,
    "micro-batch": 2e-6,  # absolute, of gradients near 1: fp32 sums in another order
}
ONE = Multipliers(1.0, 1.0, 0.3)


def moe(**keys: Any) -> tuple[MoE, Size]:
    model = MoE(name="moe", width=16, depth=2, head_dim=8, context=16, **keys)
    return model, model.base.scaled(1.0, 1.0, 71)


def mixture(net: nn.Module) -> MixtureOfExperts:
    """That of the last block."""
    return net.blocks[-1].mlp  # type: ignore[index,union-attr,return-value]


def test_one_expert_is_nanogpts_mlp_bit_for_bit() -> None:
    model, size = moe(experts=1, experts_per_token=1, bias=True)
    net = network(model, size, ONE)
    dense = NanoGPT(name="nanogpt", width=16, depth=2, head_dim=8, context=16, bias=True)
    theirs = dense.network(size, ONE)
    weights = {name.replace("experts.0.", ""): w for name, w in net.state_dict().items() if "router" not in name}
    theirs.load_state_dict(weights)
    ids, targets = tokens(size), tokens(size).roll(5)
    assert torch.equal(net(ids), theirs(ids))
    for network_ in (net, theirs):
        network_(ids, targets).backward()
    gradients = {name.replace("experts.0.", ""): p.grad for name, p in net.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=0, atol=0, msg=name)
    assert torch.count_nonzero(gradients["blocks.0.mlp.router.weight"]) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("experts", "per_token", "shared"), [(5, 2, 0), (4, 4, 1), (3, 2, 2)])
def test_a_token_is_the_weighed_sum_of_its_experts(activation: str, experts: int, per_token: int, shared: int) -> None:
    model, size = moe(experts=experts, experts_per_token=per_token, shared_experts=shared, router_activation=activation)
    layer = mixture(network(model, size, ONE).double())
    x = torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    got = layer(x)
    used: set[int] = set()
    for b, t in [(0, 0), (1, 7), (2, 15), (2, 3)]:
        logits = (layer.router.weight @ x[b, t]).detach()  # type: ignore[operator]
        best = sorted(range(experts), key=lambda e: -float(logits[e]))[:per_token]
        chosen = logits[best]
        weights = chosen.exp() / chosen.exp().sum() if activation == "softmax" else 1 / (1 + (-chosen).exp())
        expected = sum(w * layer.experts[e](x[b, t]) for w, e in zip(weights, best, strict=True))
        expected = expected + sum(expert(x[b, t]) for expert in layer.shared_experts)
        torch.testing.assert_close(got[b, t], expected, rtol=TOLERANCE["float64"], atol=TOLERANCE["float64"])
        used |= set(best)
    assert len(used) > 2 or per_token == experts  # the comparison is of several experts


def balance_written_out(layer: MixtureOfExperts, x: Tensor, experts: int, per_token: int) -> Tensor:
    """Equations 17 to 20 of 2412.19437 for the softmax router, over alpha."""
    total = torch.zeros((), dtype=x.dtype)
    for sequence in x:
        p = (sequence @ layer.router.weight.T).softmax(-1)  # type: ignore[union-attr]
        for e in range(experts):
            uses = sum(int(e in row.topk(per_token).indices) for row in p)
            total = total + experts / (per_token * len(sequence)) * uses * p[:, e].mean()
    return total / len(x)


def test_the_loss_has_the_value_of_the_cross_entropy_and_the_gradient_of_the_balance_loss_too() -> None:
    model, size = moe(experts=4, experts_per_token=2, balance=0.5)
    net = network(model, size, ONE)
    assert isinstance(net, MoEDecoder)
    ids, targets = tokens(size), tokens(size).roll(5)
    inputs: list[Tensor] = []
    hook = mixture(net).register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    loss = net(ids, targets)
    hook.remove()
    net.balance = 0.0
    plain = net(ids, targets)
    assert (
        loss.item() == plain.item() == pytest.approx(F.cross_entropy(net(ids).flatten(0, 1), targets.flatten()).item())
    )
    router = mixture(net).router.weight
    assert router is not None
    (with_balance,), (without,) = torch.autograd.grad(loss, router), torch.autograd.grad(plain, router)
    balance = balance_written_out(mixture(net), inputs[0].detach(), 4, 2)
    (expected,) = torch.autograd.grad(0.5 * balance / size.depth, router)
    assert expected.abs().max() > 1e-4
    torch.testing.assert_close(with_balance - without, expected, rtol=1e-3, atol=1e-6)


def test_labels_that_are_drawn_give_the_gradient_of_the_cross_entropy_alone() -> None:
    model, size = moe(balance=0.5)
    net = network(model, size, ONE)
    assert isinstance(net, MoEDecoder)
    draws = torch.randint(2**31, (3, 16), generator=torch.Generator().manual_seed(3))
    gradients = []
    for net.balance in (0.5, 0.0):  # type: ignore[misc]
        net.zero_grad()
        net(tokens(size), draws=draws).backward()
        gradients.append(mixture(net).router.weight.grad.clone())  # type: ignore[union-attr]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_the_gradient_of_micro_batches_is_that_of_the_whole_batch(micro_batch: int) -> None:
    """The balance loss is part of it, and an expert that a micro-batch leaves out has a gradient."""
    model, size = moe(experts=16, experts_per_token=2, balance=0.5)
    net = network(model, size, ONE)
    ids = tokens(size, batch=4, length=9)
    named = dict(net.named_parameters())

    def gradients(micro_batch: int | None) -> dict[str, Tensor]:
        batcher = MicroBatcher(micro_batch=micro_batch)
        batcher.backward(named.values(), lambda rows: net(rows[:, :-1], rows[:, 1:]), ids)
        return {name: p.grad.clone() for name, p in named.items() if p.grad is not None}

    whole, pieces = gradients(None), gradients(micro_batch)
    assert whole.keys() == pieces.keys() == named.keys()
    for name, gradient in whole.items():
        torch.testing.assert_close(pieces[name], gradient, rtol=0, atol=TOLERANCE["micro-batch"], msg=name)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "shampoo", "soap"])
def test_an_expert_that_no_token_chooses_stays_where_it_is(optimizer: str) -> None:
    """Its gradients are zeros, which every optimizer must bear."""
    built = build(tiny("moe", optimizer, experts=9, experts_per_token=2), torch.device("cpu"))
    ids = torch.zeros((1, 3), dtype=torch.int64)  # at most 4 choices in a step
    layer = mixture(built.network)
    before = [expert.up.weight.clone() for expert in layer.experts]  # type: ignore[union-attr]
    for _ in range(2):  # SOAP's first step moves nothing
        built.network(ids[:, :-1], ids[:, 1:]).backward()
        built.optimizer.step(1.0)
    after = [expert.up.weight.detach() for expert in layer.experts]  # type: ignore[operator,union-attr]
    moved = [not torch.equal(*pair) for pair in zip(before, after, strict=True)]
    assert 2 <= sum(moved) <= 8
    assert all(p.isfinite().all() for p in built.network.parameters())


def test_rules_and_inference_agree_on_the_roles_of_experts() -> None:
    run = scaled(tiny("moe", parametrization="mup", experts=4, shared_experts=1), 4.0)
    model = run.resolved.model
    with torch.device("meta"):
        base, wide = (model.network(run.resolved.size(r, 1.0), ONE) for r in (1.0, 4.0))
    inferred = {t.name: t.spec.role for t in infer(wide, base)}
    declared = {t.name: t.role for t in model.tensors(run.size)}
    assert inferred == declared
    rules = {row.name: row for row in tensor_rules.rules(run.resolved, run.size, 1.0)}
    router = rules["blocks.0.mlp.router.weight"]
    assert (router.role, router.lr_ratio, router.init_var_ratio) == (Role.ROUTER, 1 / 4, 1 / 16)
    for leaf in ("experts.3.up", "experts.0.down", "shared_experts.0.up", "shared_experts.0.down"):
        expert = rules[f"blocks.1.mlp.{leaf}.weight"]
        assert (expert.role, expert.lr_ratio, expert.init_var_ratio) == (Role.HIDDEN, 1 / 4, pytest.approx(1 / 4))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"experts": 2, "experts_per_token": 3}, "model.experts_per_token=3: expected 1 to model.experts=2"),
        ({"experts_per_token": 0}, "model.experts_per_token=0: expected 1 to model.experts=8"),
        ({"shared_experts": -1}, "model.shared_experts=-1: expected at least 0"),
        ({"experts_per_token": 1}, "set model.router_activation=sigmoid"),
        ({"router_activation": "relu"}, "model.router_activation=relu"),
        ({"balance": -1.0}, "model.balance=-1: expected at least 0"),
    ],
    ids=str,
)
def test_settings_that_make_no_mixture_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        moe(**keys)
    assert message in str(error.value)


def test_compiling_is_refused() -> None:
    message = (
        r"^training\.compile=true: the shapes within model=moe change with every batch, .* training\.compile=false$"
    )
    with pytest.raises(ConfigError, match=message):
        resolve("model=moe", "training.compile=true")


@pytest.mark.parametrize("name", ["huggingface", "megatron"])
def test_formats_of_dense_models_refuse_it(name: str) -> None:
    run = tiny("moe")
    with pytest.raises(ConfigError, match=f"^--format {name} writes models without experts.*--format pytorch$"):
        recipes.export(name, recipe.settings(run.resolved, run.size, run.base_lr))
