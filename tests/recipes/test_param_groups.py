"""Parameter groups of one's own model: those of PyPI's mup, those of our own runs, and refusals that say why."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from tiny import resolve
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import mupsweep
from mupsweep.errors import ConfigError
from mupsweep.recipes import param_groups
from mupsweep.sweep import tensor_rules

EXACT = 1e-12  # relative, float64
LR, DECAY = 0.01, 0.1
TOKENS = {"bos_token_id": 1, "eos_token_id": 2}


class Net(nn.Module):
    """Every kind of tensor: embeddings, a raw position, a stem, matrices of two widths, biases, gains, a fixed gate."""

    def __init__(self, width: int, ffn: int | None = None, depth: int = 2) -> None:
        super().__init__()
        ffn = ffn or 3 * width
        self.token_embedding = nn.Embedding(11, width)
        self.position = nn.Parameter(torch.zeros(1, 5, width))
        self.stem = nn.Conv1d(7, width, 3)
        self.mix = nn.Conv1d(width, ffn, 3)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ffn), nn.GELU(), nn.Linear(ffn, width, bias=False))
            for _ in range(depth)
        )
        self.gate = nn.Parameter(torch.ones(3))
        self.head = nn.Linear(width, 13)


def numbers(made: list[dict[str, object]], model: nn.Module) -> dict[str, tuple[float, float]]:
    """(LR, weight decay) by name."""
    names = {p: name for name, p in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in made for p in g["params"]}  # type: ignore[misc]


def test_the_documented_example_holds() -> None:
    assert doctest.testmod(param_groups) == doctest.TestResults(failed=0, attempted=7)


@pytest.mark.parametrize(("optimizer", "theirs"), [("adamw", "MuAdamW"), ("adamw", "MuAdam"), ("sgd", "MuSGD")])
@pytest.mark.parametrize(("width", "ffn"), [(16, 48), (64, 192), (64, 96), (4, 12)])
def test_the_groups_are_those_of_mup(optimizer: str, theirs: str, width: int, ffn: int) -> None:
    mup = pytest.importorskip("mup")
    model, base, delta = Net(width, ffn), Net(16, 48), Net(32, 96)
    head, model.head = model.head, mup.MuReadout(width, 13)  # it insists on a class of its own
    mup.set_base_shapes(model, base, delta=delta, rescale_params=False, do_assert=False)
    expected = numbers(getattr(mup, theirs)(model.parameters(), lr=LR, weight_decay=DECAY).param_groups, model)
    model.head = head
    groups = mupsweep.param_groups(model, base, optimizer=optimizer, lr=LR, weight_decay=DECAY, delta_model=delta)
    ours = numbers(groups, model)
    assert ours.keys() == expected.keys()
    for name, (lr, decay) in ours.items():
        assert (lr, decay) == pytest.approx(expected[name], rel=EXACT), name
    if (width, ffn) == (64, 96):
        assert len(set(ours.values())) > 2  # a test that told nothing apart would pass anyhow


def test_muadam_scales_what_its_documentation_says() -> None:
    """The same without the package: matrices lr / fan-in ratio and decay * fan-in ratio, everything else unchanged."""
    model = Net(64, 96)
    values = numbers(mupsweep.param_groups(model, Net(16, 48), lr=LR, weight_decay=DECAY), model)
    fan_in = {"mix.weight": 4, "blocks.0.1.weight": 4, "blocks.0.3.weight": 2}
    for name, (lr, decay) in values.items():
        ratio = fan_in.get(name.replace("blocks.1", "blocks.0"), 1)
        assert (lr, decay) == pytest.approx((LR / ratio, DECAY * ratio), rel=EXACT), name


LLAMA = ["model=llama", "model.qk_norm=gains", "model.head_dim=16", "model.width=64"]


PARAMETRIZATIONS, OPTIMIZERS = ["mup", "spectral", "depth_mup", "sp_per_layer"], ["adamw", "muon_kimi", "sgd", "sophia"]
MODELS = {
    "nanogpt": [],
    "llama": [*LLAMA, "model.kv_heads=2"],
    "fixed key-value heads": [*LLAMA, "model.kv_heads=2", "model.gqa_rule=fixed_kv_heads"],
}


@pytest.mark.parametrize(
    ("optimizer", "parametrization", "model"),
    [
        pytest.param(optimizer, parametrization, model, id=f"{name}-{optimizer}-{parametrization}")
        for k, (name, model) in enumerate(MODELS.items())
        for i, optimizer in enumerate(OPTIMIZERS)
        for j, parametrization in enumerate(PARAMETRIZATIONS)
        if name == "nanogpt" or (i + j + k) % 4 == 0  # every pair of two of the three
    ],
)
def test_our_own_networks_get_the_numbers_that_runs_train_with(
    optimizer: str, parametrization: str, model: list[str]
) -> None:
    resolved = replace(
        resolve("experiment=smoke", *model),
        optimizer=resolve("experiment=smoke", f"optimizer={optimizer}").optimizer,
        parametrization=resolve("experiment=smoke", f"parametrization={parametrization}").parametrization,
    )
    sizes = [resolved.size(1.0, 1.0), resolved.size(4.0, 2.0)]
    with torch.device("meta"):
        base, model = (resolved.model.network(size, tensor_rules.multipliers(resolved, size)) for size in sizes)
    groups = mupsweep.param_groups(
        model,
        base,
        optimizer=optimizer,
        parametrization=parametrization,
        lr=LR,
        weight_decay=DECAY,
        no_decay=["*norm.weight"],
        details=True,
    )
    mine = {name: group for group in groups for name in group["names"]}
    rows = tensor_rules.rules(resolved, sizes[1], LR)
    assert mine.keys() == {row.name for row in rows}
    for row in rows:
        group = mine[row.name]
        assert group["lr"] == pytest.approx(row.lr, rel=EXACT), row.name
        decay = DECAY * row.weight_decay_ratio if row.role.is_matrix else 0.0
        assert group["weight_decay"] == pytest.approx(decay, rel=EXACT), row.name
        assert group.get("eps", 0.0) == pytest.approx(row.eps, rel=EXACT), row.name
        assert group["multiplier"] == pytest.approx(row.multiplier_ratio, rel=EXACT), row.name
        assert group.get("optimizer", row.optimizer) == row.optimizer
        assert all(group[key] == pytest.approx(value, rel=EXACT) for key, value in row.thresholds.items())
        if row.role.is_matrix:
            assert group["init_std_ratio"] ** 2 == pytest.approx(row.init_var_ratio, rel=EXACT), row.name
            assert group["role"] == row.role.value


def test_the_groups_hold_every_parameter_once_and_torch_takes_them() -> None:
    model = Net(64)
    groups = mupsweep.param_groups(model, Net(16), lr=LR, weight_decay=DECAY, eps=1e-8, no_decay=["*.bias", "position"])
    assert {tuple(group) for group in groups} == {("params", "lr", "weight_decay", "eps")}  # more only when asked for
    optimizer = torch.optim.AdamW(groups)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    assert {group["eps"] for group in optimizer.param_groups} == {1e-8, 1e-8 / 4}  # fixed tensors keep theirs
    assert numbers(groups, model)["head.bias"] == (LR, 0.0)


def test_a_hybrid_says_which_optimizer_takes_a_group() -> None:
    model = Net(64)
    groups = mupsweep.param_groups(model, Net(16), optimizer="muon", parametrization="spectral", lr=LR)
    by_optimizer: dict[str, set[Tensor]] = {"muon": set(), "adamw": set()}
    for group in groups:
        by_optimizer[group["optimizer"]] |= set(group["params"])
    hidden = {"mix.weight", *(f"blocks.{i}.{j}.weight" for i in range(2) for j in (1, 3))}
    assert by_optimizer["muon"] == {model.get_parameter(name) for name in hidden}
    assert len(by_optimizer["adamw"]) == len(list(model.parameters())) - len(hidden)


def test_more_blocks_than_the_base_follow_the_depth_rule() -> None:
    groups = mupsweep.param_groups(
        Net(16, depth=8), Net(16), lr=LR, parametrization="spectral", delta_model=Net(32), details=True
    )
    multiplier = {name: group["multiplier"] for group in groups for name in group["names"]}
    assert {name: value for name, value in multiplier.items() if value != 1} == {
        name: 0.25 for name in multiplier if name.startswith("blocks.")
    }


def tied(width: int) -> nn.Module:
    model = nn.ModuleDict({"embedding": nn.Embedding(11, width), "head": nn.Linear(width, 11, bias=False)})
    model["head"].weight = model["embedding"].weight
    return model


def test_a_tied_head_is_taken_where_both_rules_agree_and_refused_where_not() -> None:
    (group,) = mupsweep.param_groups(tied(64), tied(16), lr=LR)
    assert (len(group["params"]), group["lr"]) == (1, LR)
    with pytest.raises(ConfigError, match=r"embedding\.weight and head\.weight are one tensor, but their rules differ"):
        mupsweep.param_groups(tied(64), tied(16), lr=LR, parametrization="sp_per_layer")


def test_a_tied_tensor_says_the_rules_of_all_its_names() -> None:
    """GPT-2's logits are divided by the width, which the role of its embedding alone would not say."""
    with torch.device("meta"):
        model, base = (
            GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=n, n_layer=1, n_head=2, **TOKENS))
            for n in (64, 16)
        )
    groups = mupsweep.param_groups(model, base, lr=LR, no_decay=["lm_head.weight"], weight_decay=DECAY, details=True)
    (tied_group,) = (group for group in groups if group["tied"])
    assert tied_group["names"] == ["transformer.wte.weight"]
    assert (tied_group["role"], tied_group["multiplier"], tied_group["weight_decay"]) == ("input", 1, 0)
    assert tied_group["tied"] == {"lm_head.weight": {"role": "output", "init_std_ratio": 1, "multiplier": 1 / 4}}


def test_a_role_can_be_given_by_name() -> None:
    groups = mupsweep.param_groups(Net(64), Net(16), lr=LR, roles={"head.weight": "hidden"}, details=True)
    assert {g["role"]: g["lr"] for g in groups if "head.weight" in g["names"]} == {"hidden": LR / 4}


def without(name: str) -> nn.Module:
    model = Net(16)
    delattr(model, name)
    return model


def embedding(rows: int, width: int) -> nn.Module:
    return nn.ModuleDict({"embedding": nn.Embedding(rows, width)})


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: mupsweep.param_groups(Net(64), without("gate"), lr=LR), "gate has no counterpart in the base model"),
        (lambda: mupsweep.param_groups(without("gate"), Net(16), lr=LR), "gate of the base model has no counterpart"),
        (lambda: mupsweep.param_groups(Net(64), Net(16), lr=LR, no_decay=["*.gain"]), r"'\*.gain' fits no parameter"),
        (lambda: mupsweep.param_groups(Net(64), Net(16), lr=LR, roles={"head.*": "haed"}), "no role 'haed'.*hidden"),
        (lambda: mupsweep.param_groups(Net(64), Net(16), lr=LR, roles={"gate": "hidden"}), "gate of shape"),
        (lambda: mupsweep.param_groups(Net(64), Net(16), lr=LR, optimizer="adam"), "no optimizer named 'adam'"),
        (lambda: mupsweep.param_groups(Net(16), Net(16), lr=LR, optimizer="muon"), "give delta_model"),
        (lambda: mupsweep.param_groups(Net(64), Net(16), lr=LR, delta_model=without("gate")), "differ in gate"),
        (lambda: mupsweep.param_groups(embedding(12, 8), embedding(11, 4), lr=LR), "grows along 2 axes"),
    ],
    ids=["missing", "unused", "pattern", "role", "vector", "optimizer", "base shape", "delta", "vocabulary"],
)
def test_what_cannot_be_scaled_is_refused(call: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        call()


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, mupsweep; assert 'torch' not in sys.modules; print(mupsweep.param_groups.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "mupsweep.recipes.param_groups", done.stderr


def test_factors_of_groups_multiply_lrs_of_roles_and_patterns_alone() -> None:
    def lrs(**keys: object) -> dict[str, float]:
        groups = mupsweep.param_groups(Net(64), Net(16), lr=LR, details=True, **keys)  # pyright: ignore[reportArgumentType]
        return {name: group["lr"] for group in groups for name in group["names"]}

    plain, changed = lrs(), lrs(group_lr={"hidden": 2, "blocks.1.*": 3, "head.weight": 0.5})
    expected = dict.fromkeys(plain, 1.0)
    expected |= {"mix.weight": 2, "blocks.0.1.weight": 2, "blocks.0.3.weight": 2, "head.weight": 0.5}
    expected |= {"blocks.1.0.weight": 3, "blocks.1.0.bias": 3, "blocks.1.1.bias": 3}
    expected |= {"blocks.1.1.weight": 6, "blocks.1.3.weight": 6}
    assert {name: changed[name] / plain[name] for name in plain} == pytest.approx(expected, rel=EXACT)
    with pytest.raises(ConfigError, match=r"group_lr: no tensor of the model is 'blocks\.7'"):
        lrs(group_lr={"blocks.7": 2})
