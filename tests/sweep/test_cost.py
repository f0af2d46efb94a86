"""The cost estimate against networks that really run, counted by torch."""

from __future__ import annotations

import math
import shlex
from functools import cache

import chosen
import pytest
import torch
from tiny import network, tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mupsweep.models.nanogpt import NanoGPT
from mupsweep.models.shape import Size
from mupsweep.sweep import config, plan, run_spec, tensor_rules
from mupsweep.sweep.cost import Cost, estimate
from mupsweep.training import build

TINY = ["model.width=32", "model.depth=2", "model.head_dim=8", "model.context=24", "data.tokenizer=bytes"]
CASES = [
    ["model=nanogpt"],
    ["model=nanogpt", "model.projections=fused"],
    ["model=llama"],
    ["model=llama", "model.kv_heads=2", "model.qk_norm=gains"],
    ["model=llama", "model.kv_heads=1", "model.projections=fused", "model.norm_gains=false"],
    ["model=moe", "model.experts=4", "model.shared_experts=1"],
]
RATIOS = [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (3.0, 2.0)]
TOLERANCE = {
    "flops": 0.0,  # exact where attention multiplies whole T x T matrices, as the estimate says
    "memory": 0.25,  # of what a backward pass keeps, saved tensors counted: a rough estimate
    "nanogpt": 2e-3,  # nanoGPT's formula counts gains and biases as if they multiplied like matrices
}


@cache
def resolve(*overrides: str) -> run_spec.ResolvedVariant:
    return run_spec.resolve(config.load([*TINY, *overrides]).variants[0])


def counted(resolved: run_spec.ResolvedVariant, size: Size, batch: int, with_loss: bool) -> int:
    """FLOPs of a forward and backward pass. The math backend writes attention as the two products it is."""
    net = network(resolved.model, size)
    ids = torch.zeros((batch, size.context), dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        value = net(ids, ids) if with_loss else net(ids).square().mean()
        value.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("with_loss", [False, True], ids=["logits", "loss"])
@pytest.mark.parametrize("ratios", RATIOS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_flops_are_those_of_a_forward_and_a_backward_pass(
    case: list[str], ratios: tuple[float, float], with_loss: bool
) -> None:
    resolved = resolve(*case)
    size = resolved.size(*ratios)
    cost = estimate(resolved.model.tensors(size), size, steps=1, batch_size=3)
    assert cost.flops == pytest.approx(counted(resolved, size, 3, with_loss), rel=TOLERANCE["flops"], abs=0)


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_a_tied_head_multiplies_like_any_other(case: list[str]) -> None:
    resolved = resolve(*case, "model.tied=true")
    size = resolved.size(2.0, 1.0)
    cost = estimate(resolved.model.tensors(size), size, steps=1, batch_size=2)
    assert cost.flops == counted(resolved, size, 2, with_loss=True)


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("ratios", RATIOS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_parameters_are_the_networks(case: list[str], ratios: tuple[float, float], tied: str) -> None:
    resolved = resolve(*case, f"model.tied={tied}")
    size = resolved.size(*ratios)
    with torch.device("meta"):
        net = resolved.model.network(size, tensor_rules.multipliers(resolved, size))
    assert resolved.cost(size).parameters == sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_memory_is_near_what_the_backward_pass_keeps(case: list[str]) -> None:
    """Saved storages of a block, the difference of two depths: without embeddings, head and loss."""
    resolved = resolve(*case, "model.width=64", "model.context=64")

    def kept(depth_ratio: float) -> tuple[int, float]:
        size = resolved.size(1.0, depth_ratio)
        net = network(resolved.model, size)
        weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
        saved: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = net(tokens(size), tokens(size))
        activations = sum(t.untyped_storage().nbytes() for at, t in saved.items() if at not in weights)
        assert loss.requires_grad
        cost = estimate(resolved.model.tensors(size), size, steps=1, batch_size=3)
        return activations, cost.memory - 8 * cost.parameters

    (few, few_estimated), (many, many_estimated) = kept(1.0), kept(3.0)
    assert many_estimated - few_estimated == pytest.approx(many - few, rel=TOLERANCE["memory"])


def test_a_token_computes_with_the_experts_that_it_chooses() -> None:
    """Mixtral's sums: of the experts' parameters the share k / E is active, of all others everything."""
    resolved = resolve("model=moe", "model.experts=8", "model.experts_per_token=2", "model.shared_experts=1")
    cost, dense = resolved.cost(resolved.size(2.0, 1.0)), resolve().cost(resolve().size(2.0, 1.0))
    router, expert = 2 * 8 * 64, 2 * 8 * 64 * 64
    assert cost.parameters == dense.parameters + router + 8 * expert
    assert cost.active_parameters == dense.parameters + router + 2 * expert
    assert cost.flops == dense.flops + 6 * (router + 2 * expert) * cost.tokens
    assert dense.active_parameters is None


def test_gpt2_costs_what_nanogpts_formula_says() -> None:
    size = Size(
        width=768, depth=12, heads=12, kv_heads=12, head_dim=64, ffn_width=3072, vocab_size=50_257, context=1024
    )
    model = NanoGPT(name="gpt2", width=768, depth=12, bias=True, tied=True)
    cost = estimate(model.tensors(size), size, steps=2, batch_size=5, state=2 * 124_439_808)
    assert cost.parameters == 124_439_808
    assert cost.tokens == 2 * 5 * 1024
    # estimate_mfu of karpathy/nanoGPT: 6 N + 12 L H Q T, N without the position embedding
    per_token = 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    assert cost.flops == pytest.approx(per_token * cost.tokens, rel=TOLERANCE["nanogpt"])
    # weights, gradients and two moments in fp32; of 12 blocks the inputs and outputs of six matrices; logits twice
    activations = 5 * 1024 * 12 * (4 * 2 + 2 * 5) * 768
    assert cost.memory == 4 * (4 * cost.parameters + activations + 2 * 2**27)
    one = estimate(model.tensors(size), size, steps=2, batch_size=1, state=2 * 124_439_808)
    assert one.memory == 4 * (4 * cost.parameters + activations / 5 + 2 * 1024 * 50_257)


STATES = [
    *(shlex.join(chosen.words("optimizer", name)) for name in config.choices("optimizer")),
    "optimizer=sgd optimizer.momentum=0",
    "optimizer=muon optimizer.block_size=12",
    "optimizer=muon optimizer.spectral_norm=true optimizer.rest=lion",
    "optimizer=muon optimizer.graft=adamw optimizer.hyperball=true",
    "optimizer=muon_plus_plus optimizer.adaptive=0.5",
    "optimizer=shampoo optimizer.block_size=12 optimizer.graft=adamw",
    "optimizer=shampoo optimizer.exponents=[1/2,0]",
    "optimizer=shampoo optimizer.max_axis=40 optimizer.block_size=20",
    "optimizer=soap optimizer.max_axis=40",
    "optimizer=soap optimizer.max_axis=8",
    "optimizer=adamw optimizer.roles=[hidden] optimizer.rest=sgd optimizer.hyperball=true",
    "optimizer=muon model.tied=true parametrization=sp",
]


@pytest.mark.parametrize("overrides", STATES)
def test_the_state_of_an_optimizer_is_as_large_as_it_says(overrides: str) -> None:
    """Every number of its state after a step, but for counters of steps and the like, one per tensor."""
    one = [*TINY, "training.batch_size=2", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-9]", *shlex.split(overrides)]
    (run,) = plan.plan(config.load(one))
    built = build.build(run, torch.device("cpu"))
    ids = tokens(run.size)
    if built.optimizer.curvature_due(0):
        built.network(ids, ids).backward()
        built.optimizer.observe(0)
    built.network(ids, ids).backward()
    built.optimizer.step(1.0)
    states = [state for member in built.optimizer.members for state in member.state.values()]
    counters = ("step", "mu_product")
    held = sum(v.numel() for state in states for name, v in state.items() if v is not None and name not in counters)
    lean = estimate(run.resolved.model.tensors(run.size), run.size, 1, 2)
    assert (run.cost.memory - lean.memory) / 4 == held


def test_devices_share_the_batch_and_sharded_ones_the_state_too() -> None:
    def memory(*launcher: str) -> float:
        overrides = [*TINY, "training.batch_size=4", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-9]", *launcher]
        return plan.plan(config.load(overrides))[0].cost.memory

    resolved = resolve("training.batch_size=4").cost(resolve().size(1.0, 1.0))
    kept = 16 * resolved.parameters  # weights, gradients and two moments in fp32
    activations = resolved.memory - kept
    assert activations > 0
    assert memory("launcher=local") == resolved.memory
    two = ("launcher=local", "launcher.devices_per_run=2")
    assert memory(*two) == kept + activations / 2
    assert memory(*two, "launcher.shard=true") == kept / 2 + activations / 2
    assert memory(*two, "training.micro_batch=1") == kept + activations / 4
    assert memory("launcher=local", "launcher.sizes={w32-d2:{devices_per_run:2,shard:true}}") == resolved.memory / 2


def test_tokens_and_flops_grow_with_steps_and_batch_alone() -> None:
    resolved = resolve("training.steps=7", "training.batch_size=5")
    size = resolved.size(1.0, 1.0)
    one = estimate(resolved.model.tensors(size), size, 1, 1)
    run = resolved.cost(size)
    assert (run.tokens, run.flops) == (35 * one.tokens, 35 * one.flops)
    assert run.parameters == one.parameters
    assert one.tokens == size.context


def test_a_budget_of_tokens_is_rounded_up_to_whole_steps() -> None:
    resolved = resolve("training.steps=null", "training.tokens=1000", "training.batch_size=4")
    assert resolved.steps == math.ceil(1000 / (4 * 24)) == 11
    assert resolved.cost(resolved.size(1.0, 1.0)).tokens == 11 * 4 * 24


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
def test_time_grows_with_steps_and_with_flops(device: str) -> None:
    small, large = Cost(1, 1, 1e12, 1.0), Cost(1, 1, 2e12, 1.0)
    assert small.seconds(10, device) < small.seconds(20, device)
    assert small.seconds(10, device) < large.seconds(10, device)
