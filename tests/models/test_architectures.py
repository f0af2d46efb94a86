"""The contract of models: every yaml of configs/model against its table, its rules and what a decoder must do."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, MODELS, network, resolve, scaled, tiny, tokens
from torch import Tensor, nn

from mupsweep.scaling import Role
from mupsweep.sweep import run_spec, tensor_rules
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training import build
from mupsweep.training.devices import autocast

TOLERANCE = {
    "rule": 1e-12,  # relative, float64
    "prefix": 1e-11,  # float64
    "fused": 1e-5,  # fp32, logits of size 1: the same products in another order
    "bf16": 0.1,  # error of bf16 autocast relative to the spread of the logits
    "compiled fp32": 1e-5,  # of the loss, and of gradients relative to the largest
    "compiled bf16": 2e-2,
}
# float64; of other models 0. How many rows a product has changes its rounding, and later tokens choose experts too.
FUTURE = {"moe": 1e-12}
RATIOS = [(1.0, 1.0), (2.0, 1.0), (1.0, 2.0), (2.0, 2.0)]
CPU = torch.device("cpu")
FUSED = {"qkv": ("query", "key", "value"), "gate_up": ("gate", "up")}
# An architecture with everything that a key of its yaml can add.
EVERYTHING: dict[str, dict[str, Any]] = {
    "nanogpt": {"bias": True},
    "llama": {"kv_heads": 1, "qk_norm": "gains"},
    "moe": {"experts": 3, "shared_experts": 1},
}


def everything(name: str, optimizer: str = "adamw", **keys: Any) -> RunSpec:
    return tiny(name, optimizer, **EVERYTHING.get(name, {}), **keys)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_has_the_name_of_its_file_and_a_key_for_every_field(name: str) -> None:
    resolved = resolve(f"model={name}")
    assert resolved.model.name == name
    assert {f.name for f in fields(resolved.model)} | {"kind"} == set(resolved.variant.model)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_model_without_norms_is_its_other_modules_alone(name: str) -> None:
    keys: dict[str, Any] = EVERYTHING[name] | ({"bias": False} if name == "nanogpt" else {})
    normed, plain = tiny(name, **keys), tiny(name, **keys, norms=False)
    net, without = network(normed.resolved.model, normed.size, std=0.1), network(plain.resolved.model, plain.size)
    norms = ("norm.", "attention_norm.", "mlp_norm.")
    kept = {k: v for k, v in net.state_dict().items() if not f"{k.split('.')[-2]}.".startswith(norms)}
    assert len(net.state_dict()) - len(kept) == 2 * normed.size.depth + 1
    without.load_state_dict(kept)
    ids = tokens(plain.size)
    for module in list(net.modules()):
        for child in {"norm", "attention_norm", "mlp_norm"} & dict(module.named_children()).keys():
            setattr(module, child, nn.Identity())
    with torch.no_grad():
        assert torch.equal(without(ids), net(ids))


def test_norms_are_no_part_of_a_runs_identity_unless_they_are_left_out() -> None:
    with_norms, without = (resolve("data.tokenizer=bytes", *words) for words in ((), ("model.norms=false",)))
    older = {key: value for key, value in with_norms.variant.model.items() if key != "norms"}
    assert run_spec.resolve(replace(with_norms.variant, model=older)).digest == with_norms.digest != without.digest


@pytest.mark.parametrize("ratios", RATIOS, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_the_table_of_tensors_is_the_state_dict(name: str, ratios: tuple[float, float]) -> None:
    resolved = resolve(f"model={name}")
    size = resolved.size(*ratios)
    with torch.device("meta"):
        net = resolved.model.network(size, tensor_rules.multipliers(resolved, size))
    table = {t.name: t.shape for t in resolved.model.tensors(size)}
    assert len(table) == len(list(resolved.model.tensors(size)))
    assert table == {key: tuple(value.shape) for key, value in net.state_dict().items()}


@pytest.mark.parametrize("name", MODELS)
def test_roles_grow_as_declared(name: str) -> None:
    resolved = resolve(f"model={name}")
    small, wide, deep = ({t.name: t for t in resolved.model.tensors(resolved.size(*r))} for r in RATIOS[:3])
    assert small.keys() == wide.keys()
    for key, t in small.items():
        grew = tuple(b > s for s, b in zip(t.acting_dims, wide[key].acting_dims, strict=True))
        assert grew == (t.role.grows if t.role.is_matrix else (True, False)), key
        assert len(t.shape) == (2 if t.role.is_matrix else 1), key
        assert deep[key] == t
    assert all(key.startswith("blocks.") for key in deep.keys() - small.keys())
    assert len(deep) - len(small) == sum(key.startswith("blocks.") for key in small)


@pytest.mark.parametrize("name", MODELS)
def test_what_lies_inside_a_block_has_a_hidden_role(name: str) -> None:
    resolved = resolve(f"model={name}")
    for t in resolved.model.tensors(resolved.size(1.0, 1.0)):
        assert (t.role in (Role.HIDDEN, Role.HIDDEN_VECTOR, Role.ROUTER)) == t.name.startswith("blocks."), t.name
        assert t.decay == t.role.is_matrix, t.name


@pytest.mark.parametrize("name", MODELS)
def test_a_vocabulary_changes_only_the_embedding_and_the_head(name: str) -> None:
    resolved = resolve(f"model={name}")
    size = resolved.size(1.0, 1.0)
    larger = replace(size, vocab_size=size.vocab_size + 64)
    pairs = zip(resolved.model.tensors(size), resolved.model.tensors(larger), strict=True)
    assert {a.name for a, b in pairs if a.shape != b.shape} == {"token_embedding.weight", "head.weight"}


@pytest.mark.parametrize(
    ("name", "optimizer"), [*((name, "adamw") for name in MODELS), *((name, "muon") for name in ARCHITECTURES)]
)
def test_the_base_shape_is_a_fixed_point(name: str, optimizer: str) -> None:
    """Rules, weights, loss and the weights after two steps are those of sp, bit for bit."""
    ends = []
    for parametrization in ("sp", "spectral"):
        model = tiny(name, optimizer, parametrization)
        built = build.build(model, CPU)
        started = {k: v.clone() for k, v in built.network.state_dict().items()}
        losses = [step(built, tokens(model.size)) for _ in range(2)]
        ends.append(
            (tensor_rules.rules(model.resolved, model.size, model.base_lr), started, losses, built.network.state_dict())
        )
    (sp_rules, sp_start, sp_losses, sp_end), (rules, start, losses, end) = ends
    assert rules == sp_rules
    assert losses == sp_losses
    for key, weight in start.items():
        assert torch.equal(weight, sp_start[key]), key
        assert torch.equal(end[key], sp_end[key]), key
    assert not torch.equal(end["token_embedding.weight"], start["token_embedding.weight"])


def step(built: build.TrainingSetup, ids: Tensor) -> float:
    """One step on the same tokens, next to be predicted from the one before; its loss."""
    loss = built.network(ids[:, :-1], ids[:, 1:])
    loss.backward()
    built.optimizer.step(1.0)
    return loss.item()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("projections", ["split", "fused"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_few_steps_of_training_reduce_the_loss(name: str, projections: str, optimizer: str) -> None:
    scaling = scaled(everything(name, optimizer, projections=projections), 2.0)
    built = build.build(scaling, CPU)
    losses = [step(built, tokens(scaling.size)) for _ in range(20)]
    assert losses[0] == pytest.approx(torch.tensor(scaling.size.vocab_size).log().item(), abs=0.2)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("projections", ["split", "fused"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_flow_to_every_tensor(name: str, projections: str) -> None:
    spec = everything(name, projections=projections)
    net = network(spec.resolved.model, spec.size)
    ids = tokens(spec.size)
    net(ids[:, :-1], ids[:, 1:]).backward()
    for key, parameter in net.named_parameters():
        if key.endswith("key.bias") and net.position_embedding is not None:
            continue  # adds the same to every score of a query, unless keys are turned by their positions
        assert parameter.grad is not None, key
        assert parameter.grad.abs().max() > 1e-5, key
    assert len(list(net.parameters())) == len(list(spec.resolved.model.tensors(spec.size)))


def stacked(split: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
    """The weights of a model with split projections, for one with fused projections."""
    made = {}
    for name in names:
        head, fused, leaf = (*name.rsplit(".", 2), "", "")[:3]
        whole = [split[f"{head}.{part}.{leaf}"] for part in FUSED.get(fused, ())]
        made[name] = torch.cat(whole) if whole else split[name]
    return made


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_fused_projections_compute_what_split_ones_do(name: str) -> None:
    split, fused = (everything(name, projections=kind) for kind in ("split", "fused"))
    one, other = (network(made.resolved.model, made.size) for made in (split, fused))
    other.load_state_dict(stacked(one.state_dict(), list(other.state_dict())))
    ids = tokens(split.size)
    with torch.no_grad():
        torch.testing.assert_close(one(ids), other(ids), rtol=TOLERANCE["fused"], atol=TOLERANCE["fused"])
    assert one(ids).std() > 0.5
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in other.parameters())
    assert len(other.state_dict()) < len(one.state_dict())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "muon", "muon_kimi"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_fused_tensor_has_the_rule_of_its_parts(name: str, optimizer: str) -> None:
    """Ratios to the base shape; the MLP is a whole multiple of the width, so that every part grows alike."""
    rows = {}
    for kind in ("split", "fused"):
        scaling = scaled(everything(name, optimizer, projections=kind, ffn_ratio=4.0), 4.0, 2.0)
        rows[kind] = {r.name: r for r in tensor_rules.rules(scaling.resolved, scaling.size, scaling.base_lr)}
    compared = 0
    for key, mine in rows["split"].items():
        head, part, leaf = (*key.rsplit(".", 2), "", "")[:3]
        fused = next((whole for whole, parts in FUSED.items() if part in parts), "")
        theirs = rows["fused"].get(f"{head}.{fused}.{leaf}")
        if theirs is None:  # the up matrix of an MLP without gate has nothing to be fused with
            assert key in rows["fused"]
            continue
        compared += 1
        for ratio in ("init_var_ratio", "multiplier_ratio", "lr_ratio", "weight_decay_ratio", "eps_ratio"):
            assert getattr(mine, ratio) == pytest.approx(getattr(theirs, ratio), rel=TOLERANCE["rule"]), (key, ratio)
        assert mine.init_std == pytest.approx(theirs.init_std, rel=TOLERANCE["rule"])
    assert compared >= 3 * scaling.size.depth


@pytest.mark.parametrize("name", MODELS)
def test_no_token_sees_the_future_and_every_token_sees_the_past(name: str) -> None:
    model = tiny(name)
    net = network(model.resolved.model, model.size).double()
    ids = tokens(model.size, batch=1)
    for changed in (1, 9, model.size.context - 1):
        other = ids.clone()
        other[0, changed] = (ids[0, changed] + 1) % model.size.vocab_size
        with torch.no_grad():
            moved = (net(ids) - net(other)).abs().amax(dim=(0, 2))
        assert (moved[:changed] <= FUTURE.get(name, 0.0)).all()
        assert (moved[changed:] > 1e-9).all()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_shorter_text_has_the_logits_of_its_prefix(name: str) -> None:
    spec = everything(name)
    net = network(spec.resolved.model, spec.size).double()
    ids = tokens(spec.size)
    with torch.no_grad():
        torch.testing.assert_close(net(ids[:, :5]), net(ids)[:, :5], rtol=TOLERANCE["prefix"], atol=TOLERANCE["prefix"])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_order_of_the_tokens_matters(name: str) -> None:
    spec = everything(name)
    net = network(spec.resolved.model, spec.size)
    ids = tokens(spec.size, batch=1)
    swapped = ids.clone()
    swapped[0, [2, 3]] = ids[0, [3, 2]]
    assert not torch.equal(ids, swapped)
    with torch.no_grad():
        assert (net(ids) - net(swapped))[0, -1].abs().max() > 1e-4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bf16_autocast_computes_the_same_to_its_precision(name: str) -> None:
    spec = everything(name)
    net = network(spec.resolved.model, spec.size)
    ids = tokens(spec.size)
    with torch.no_grad():
        exact = net(ids)
        with autocast("bf16", CPU):
            rounded = net(ids)
    assert rounded.dtype is torch.bfloat16
    error = (rounded - exact).std() / exact.std()
    assert 1e-4 < error < TOLERANCE["bf16"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler warns of its own parts
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "moe"])  # which is refused
def test_a_compiled_network_has_the_loss_and_gradients_of_the_plain_one(name: str, precision: str) -> None:
    spec = everything(name)
    net = network(spec.resolved.model, spec.size)
    ids = tokens(spec.size)
    found = []
    for forward in (net, torch.compile(net, dynamic=False)):
        net.zero_grad()
        with autocast(precision, CPU):
            loss = forward(ids[:, :-1], ids[:, 1:])
        loss.backward()
        found.append((loss.item(), {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}))
    tolerance = TOLERANCE[f"compiled {precision}"]
    assert found[0][0] == pytest.approx(found[1][0], rel=tolerance)
    largest = max(grad.norm() for grad in found[0][1].values())
    for key, grad in found[0][1].items():
        assert (grad - found[1][1][key]).norm() < tolerance * largest, key
