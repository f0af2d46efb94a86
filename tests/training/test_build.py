"""Building a run: the base shape is SP's bit for bit, and a run trains with exactly the solved rules."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path

import chosen
import pytest
import torch
from torch import Tensor, nn

from mupsweep.data import Dataset, prepare
from mupsweep.errors import ConfigError
from mupsweep.models import Multipliers
from mupsweep.models.nanogpt import NanoGPT
from mupsweep.models.shape import Size
from mupsweep.scaling import Init, Role, TensorSpec
from mupsweep.store.run_dir import RunDir
from mupsweep.sweep import config, run_spec
from mupsweep.sweep.plan import plan
from mupsweep.sweep.run_spec import ResolvedVariant, RunSpec
from mupsweep.sweep.tensor_rules import TensorRule, audit, clip_norm, multipliers, rules
from mupsweep.training.build import TrainingSetup, build, group_records
from mupsweep.training.trainer import train

TOLERANCE = {
    "rule": 1e-12,  # relative, float64 monomials
    "std": 5.0,  # standard errors of a measured standard deviation or mean
}
# but for a wrong rule, which differs in the solver alone
PARAMETRIZATIONS = [name for name in config.choices("parametrization") if name != "mup_adamw_rule"]
OPTIMIZERS = ["adamw", "muon", "sgd"]
CPU = torch.device("cpu")
WIDTH, LR = 16, 2.0**-6


@cache
def run(*overrides: str) -> RunSpec:
    """The one run of a tiny sweep: width 16, depth 2, at the base shape unless overridden."""
    tiny = ["experiment=smoke", "training.precision=fp32", "sweep.width_ratios=[1]", "sweep.log2_lrs=[-6]"]
    (spec,) = plan(config.load([*tiny, *overrides]))
    return spec


def wide_and_deep(*overrides: str) -> RunSpec:
    """The one run of a sweep at four times the base width and twice its depth."""
    return run("sweep.width_ratios=[4]", "sweep.depth_ratios=[2]", *overrides)


@cache
def resolved(group: str, name: str) -> ResolvedVariant:
    """The variant of a choice, with whatever else it needs."""
    return run_spec.resolve(config.load(chosen.words(group, name)).variants[0])


def under(parametrization: str, spec: RunSpec) -> RunSpec:
    """The run under another parametrization; composing each combination anew would take most of the time."""
    rule = resolved("parametrization", parametrization).parametrization
    return replace(spec, resolved=replace(spec.resolved, parametrization=rule))


def weights(setup: TrainingSetup) -> dict[str, Tensor]:
    return setup.network.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Undisturbed:
    def stop_requested(self) -> bool:
        return False

    def lease_lost(self) -> bool:
        return False


@pytest.fixture(scope="module")
def data() -> Dataset:
    return prepare(run().resolved.variant.data)


FIVE_STEPS = ["training.steps=5", "training.warmup=1", "training.eval_batches=1", "optimizer.weight_decay=0.1"]


@dataclass
class FirstSteps:
    rules: tuple[TensorRule, ...]
    start: dict[str, Tensor]
    end: dict[str, Tensor]
    metrics: list[dict[str, object]]
    val_loss: float


@pytest.fixture(scope="module")
def first_steps(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], FirstSteps]:
    """Train five steps under an optimizer and a parametrization; each pair once."""

    @cache
    def train_first_steps(optimizer: str, parametrization: str) -> FirstSteps:
        spec = under(parametrization, run(f"optimizer={optimizer}", "model.bias=true", *FIVE_STEPS))
        setup = build(spec, CPU)
        start = {name: w.clone() for name, w in weights(setup).items()}
        folder = RunDir(tmp_path_factory.mktemp("run"))
        summary = train(spec, setup, data, folder, CPU, Undisturbed())
        rows = rules(spec.resolved, spec.size, spec.base_lr)
        return FirstSteps(rows, start, weights(setup), folder.metrics(), summary["val_loss"])

    return train_first_steps


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parametrization", [p for p in PARAMETRIZATIONS if p != "sp"])
def test_the_base_shape_is_a_fixed_point(
    parametrization: str, optimizer: str, first_steps: Callable[[str, str], FirstSteps]
) -> None:
    """Rules, initial weights, and the weights and losses of five steps are SP's, bit for bit."""
    steps, sp = first_steps(optimizer, parametrization), first_steps(optimizer, "sp")
    assert steps.rules == sp.rules
    assert same(steps.start, sp.start)
    assert same(steps.end, sp.end)
    assert (steps.metrics, steps.val_loss) == (sp.metrics, sp.val_loss)
    assert len(steps.metrics) == 5
    assert all(not torch.equal(steps.start[name], w) for name, w in steps.end.items())


@pytest.mark.parametrize("optimizer", config.choices("optimizer"))
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_every_ratio_at_the_base_shape_is_exactly_one(parametrization: str, optimizer: str) -> None:
    spec = under(parametrization, run())
    recipe = replace(spec.resolved, optimizer=resolved("optimizer", optimizer).optimizer)
    for row in rules(recipe, spec.size, LR):
        ratios = {v for k, v in asdict(row).items() if k.endswith("_ratio")}
        assert ratios == {1.0}, row.name


# (init std, LR, multiplier) relative to the base at r_n = 4, r_L = 2 under AdamW: Zheng et al. 2603.00541,
# Tables 6 (a = 1) and 12 (a = 1/2); mup is Table 6 at r_L = 1.
PUBLISHED = {
    "sp": {"hidden": (1, 1, 1), "input": (1, 1, 1), "output": (1, 1, 1), "hidden_vector": (1, 1, 1)},
    "mup": {
        "hidden": (1 / 2, 1 / 4, 1),
        "input": (1, 1, 1),
        "output": (1, 1, 1 / 4),
        "hidden_vector": (1, 1, 1),
    },
    "spectral": {
        "hidden": (1 / 2, 1 / 4, 1 / 2),
        "input": (1, 1, 1),
        "output": (1, 1, 1 / 4),
        "hidden_vector": (1, 1, 1 / 2),
    },
    "depth_mup": {
        "hidden": (1 / 2, 1 / 4 / math.sqrt(2), 1 / math.sqrt(2)),
        "input": (1, 1, 1),
        "output": (1, 1, 1 / 4),
        "hidden_vector": (1, 1 / math.sqrt(2), 1 / math.sqrt(2)),
    },
}


@pytest.mark.parametrize("parametrization", PUBLISHED)
def test_the_numbers_of_a_run_are_the_published_ones(parametrization: str) -> None:
    spec = under(parametrization, wide_and_deep())
    seen = set()
    for row in rules(spec.resolved, spec.size, LR):
        if row.role.value in PUBLISHED[parametrization]:
            std, lr, multiplier = PUBLISHED[parametrization][row.role.value]
            seen.add(row.role.value)
            if row.init is Init.NORMAL:
                assert row.init_std == pytest.approx(0.02 * std, rel=TOLERANCE["rule"]), row.name
            assert row.lr == pytest.approx(LR * lr, rel=TOLERANCE["rule"]), row.name
            assert row.multiplier == pytest.approx(multiplier, rel=TOLERANCE["rule"]), row.name
    assert seen == set(PUBLISHED[parametrization])


@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_the_weights_start_with_the_standard_deviation_of_their_rule(parametrization: str) -> None:
    spec = under(parametrization, wide_and_deep("model.bias=true"))
    started = weights(build(spec, CPU))
    for row in rules(spec.resolved, spec.size, spec.base_lr):
        w = started[row.name].double()
        if row.init is Init.NORMAL:
            error = TOLERANCE["std"] / math.sqrt(w.numel())
            assert w.square().mean().sqrt() == pytest.approx(row.init_std, rel=error / math.sqrt(2)), row.name
            assert abs(w.mean()) < error * row.init_std, row.name
            kurtosis = (w**4).mean() / w.square().mean() ** 2  # 3 for a Gaussian, variance 24 / n
            assert kurtosis == pytest.approx(3.0, abs=2 * error * math.sqrt(24)), row.name
        else:
            assert (w == (1.0 if row.init is Init.ONES else 0.0)).all(), row.name


def test_a_head_of_zeros_starts_at_zero_and_its_model_at_the_log_of_the_vocabulary(data: Dataset) -> None:
    spec = run("model.head_init_std=0.0")
    setup = build(spec, CPU)
    assert (weights(setup)["head.weight"] == 0).all()
    block = torch.from_numpy(data.train_batch(32, 4, 0, 0))
    loss = setup.network(block[:, :-1], block[:, 1:])
    assert loss.item() == pytest.approx(math.log(spec.size.vocab_size), rel=1e-6)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("parametrization", PARAMETRIZATIONS)
def test_groups_json_and_the_optimizer_hold_the_numbers_of_the_rules(
    parametrization: str, optimizer: str, tmp_path: Path
) -> None:
    spec = under(parametrization, wide_and_deep(f"optimizer={optimizer}", "optimizer.weight_decay=0.1"))
    setup = build(spec, CPU)
    folder = RunDir(tmp_path / "run")
    folder.path.mkdir()
    folder.write_rules({}, group_records(setup))
    written = json.loads((folder.path / "groups.json").read_text())
    names = {id(p): n for n, p in setup.network.named_parameters()}
    live = {
        names[id(p)]: (group["peak_lr"], group["weight_decay"], group.get("eps"))
        for member in setup.optimizer.members
        for group in member.param_groups
        for p in group["params"]
    }
    in_file = {name: group for group in written for name in group["tensors"]}
    assert sum(len(group["tensors"]) for group in written) == len(in_file)
    rows = {row.name: row for row in rules(spec.resolved, spec.size, spec.base_lr)}
    assert in_file.keys() == live.keys() == rows.keys() == names_of(setup)
    for name, row in rows.items():
        group = in_file[name]
        assert group["optimizer"] == row.optimizer
        assert (group["lr"], group["weight_decay"], group["eps"]) == (row.lr, row.weight_decay, row.eps), name
        assert live[name][:2] == (row.lr, row.weight_decay), name
        assert live[name][2] in (row.eps, None if optimizer == "sgd" else row.eps), name


def names_of(setup: TrainingSetup) -> set[str]:
    return {name for name, _ in setup.network.named_parameters()}


def test_the_network_has_the_multipliers_of_the_rules() -> None:
    spec = wide_and_deep("parametrization=spectral", "model.output_multiplier=3.0")
    net = build(spec, CPU).network
    row = {r.name: r for r in rules(spec.resolved, spec.size, LR)}
    assert net.multiplier == row["head.weight"].multiplier == 0.75
    assert {b.multiplier for b in net.blocks} == {row["blocks.3.mlp.up.weight"].multiplier} == {0.5}
    assert multipliers(spec.resolved, spec.size) == Multipliers(0.5, 0.75, 8**-0.5)


def test_the_other_optimizer_of_a_hybrid_has_its_own_base_lr() -> None:
    spec = wide_and_deep("optimizer=muon", "parametrization=sp")
    for row in rules(spec.resolved, spec.size, LR):
        assert row.optimizer == ("muon" if row.role is Role.HIDDEN else "adamw")
        assert row.lr == pytest.approx(LR * (1.0 if row.role is Role.HIDDEN else 0.1), rel=TOLERANCE["rule"])


def test_only_matrices_decay() -> None:
    spec = run("optimizer.weight_decay=0.1", "model.bias=true")
    for row in rules(spec.resolved, spec.size, LR):
        assert row.weight_decay == (0.1 if row.role.is_matrix else 0.0), row.name


def test_the_lr_factor_multiplies_every_groups_peak() -> None:
    setup = build(wide_and_deep("optimizer=muon"), CPU)
    for factor in (0.25, 1.0, 0.5):
        setup.optimizer.step(factor)
        for member in setup.optimizer.members:
            for group in member.param_groups:
                assert group["lr"] == factor * group["peak_lr"]
    peaks = {group["peak_lr"] for member in setup.optimizer.members for group in member.param_groups}
    assert peaks == {group["lr"] for group in setup.groups}


# Ties.


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_tied_head_is_the_embedding_and_trains_with_it(optimizer: str) -> None:
    spec = wide_and_deep(f"optimizer={optimizer}", "parametrization=spectral", "model.tied=true")
    setup = build(spec, CPU)
    net = setup.network
    assert net.head.weight.data_ptr() == net.token_embedding.weight.data_ptr()
    assert "head.weight" not in names_of(setup)
    assert net.token_embedding.weight.detach().std() == pytest.approx(0.02, rel=0.05)
    grouped = [name for group in setup.groups for name in group["tensors"]]
    assert sorted(grouped) == sorted(names_of(setup))
    before = net.token_embedding.weight.detach().clone()
    ids = torch.arange(8)[None]
    net(ids, ids.roll(1)).backward()
    setup.optimizer.step(1.0)
    moved = (net.head.weight - before).abs().amax(dim=1)
    assert (moved[100:200] > 0).all()  # rows that only the head's gradient reaches


@pytest.mark.parametrize("parametrization", ["spectral", "mup", "depth_mup"])
def test_a_tie_whose_two_rules_disagree_is_refused(parametrization: str) -> None:
    spec = wide_and_deep(f"parametrization={parametrization}", "parametrization.output=init", "model.tied=true")
    with pytest.raises(ConfigError) as refused:
        rules(spec.resolved, spec.size, LR)
    for part in (
        "token_embedding.weight",
        "head.weight",
        parametrization,
        "adamw",
        "init_std x1 for the one and x0.25 for the other",
        "use model.tied=false, or parametrization.output=multiplier",
    ):
        assert part in str(refused.value)


def test_a_tie_is_legal_where_both_rules_agree() -> None:
    at_base = run("parametrization=spectral", "parametrization.output=init", "model.tied=true")
    assert rules(at_base.resolved, at_base.size, LR)[-1].tied_to == "token_embedding.weight"
    sp = wide_and_deep("parametrization=sp", "model.tied=true")
    assert rules(sp.resolved, sp.size, LR)[-1].lr == LR


# Models whose declarations are wrong.


class WrongRole(NanoGPT):
    def tensors(self, size: Size) -> Iterator[TensorSpec]:
        for t in super().tensors(size):
            yield replace(t, role=Role.OUTPUT) if t.name == "blocks.1.mlp.up.weight" else t


class WrongVector(NanoGPT):
    def tensors(self, size: Size) -> Iterator[TensorSpec]:
        for t in super().tensors(size):
            yield replace(t, shape=(size.context,)) if t.name == "norm.weight" else t


class UndeclaredParameter(NanoGPT):
    def network(self, size: Size, multipliers: Multipliers) -> nn.Module:
        network = super().network(size, multipliers)
        network.temperature = nn.Parameter(torch.ones(1))
        return network


class UndeclaredBuffer(NanoGPT):
    def network(self, size: Size, multipliers: Multipliers) -> nn.Module:
        network = super().network(size, multipliers)
        network.register_buffer("mask", torch.ones(1))
        return network


class MissingModule(NanoGPT):
    def tensors(self, size: Size) -> Iterator[TensorSpec]:
        yield from super().tensors(size)
        yield TensorSpec("extra.weight", (size.width, size.width), Role.HIDDEN, init_std=0.02)


class OtherShape(NanoGPT):
    def network(self, size: Size, multipliers: Multipliers) -> nn.Module:
        return super().network(replace(size, context=size.context + 1), multipliers)


def with_model(cls: type[NanoGPT], spec: RunSpec) -> RunSpec:
    model = spec.resolved.model
    wrong = cls(**{f.name: getattr(model, f.name) for f in fields(model)})
    return replace(spec, resolved=replace(spec.resolved, model=wrong))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (
            WrongRole,
            r"blocks\.1\.mlp\.up\.weight is declared output.*from \(64, 16\) to \(128, 32\) when the width doubles",
        ),
        (WrongVector, r"norm\.weight is declared input_vector.*from \(32, 1\) to \(32, 1\)"),
    ],
)
@pytest.mark.parametrize("spec", [run(), wide_and_deep()], ids=["base", "target"])
def test_a_role_that_its_shape_contradicts_is_refused(cls: type[NanoGPT], message: str, spec: RunSpec) -> None:
    wrong = with_model(cls, spec)
    with pytest.raises(ConfigError, match=message):
        rules(wrong.resolved, wrong.size, LR)


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (UndeclaredParameter, r"^temperature: the model declares None but its network has \(1,\)"),
        (UndeclaredBuffer, r"^mask: the model declares None but its network has \(1,\)"),
        (MissingModule, r"^extra\.weight: the model declares \(16, 16\) but its network has None"),
        (OtherShape, r"^position_embedding\.weight: .* \(32, 16\) but its network has \(33, 16\)"),
    ],
)
def test_a_network_that_differs_from_its_table_is_refused(cls: type[NanoGPT], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(with_model(cls, run()), CPU)


@pytest.mark.parametrize("rule", ["coupled_constant", "independent", "timescale", "unscaled"])
@pytest.mark.parametrize("nesterov", ["false", "true"])
def test_sgd_with_momentum_decays_by_what_rules_prints(rule: str, nesterov: str) -> None:
    words = ["optimizer=sgd", "optimizer.momentum=0.9", f"optimizer.nesterov={nesterov}", "optimizer.weight_decay=0.1"]
    spec = wide_and_deep(*words, f"parametrization.weight_decay_rule={rule}", "model.bias=false")
    built, steps = build(spec, CPU), 20
    start = {name: p.detach().clone() for name, p in built.network.named_parameters()}
    for _ in range(steps):
        for p in built.network.parameters():
            p.grad = torch.zeros_like(p)
        built.optimizer.step(1.0)
    rows = rules(spec.resolved, spec.size, spec.base_lr)
    assert sum(row.decay_per_step > 0 for row in rows) > 2
    for row in rows:
        kept = start[row.name] * (1 - row.decay_per_step) ** steps
        torch.testing.assert_close(built.network.get_parameter(row.name).detach(), kept, rtol=1e-5, atol=0)
    if rule == "independent":
        assert rows[0].decay_per_step == pytest.approx(0.1, rel=TOLERANCE["rule"])


# Clipping and the audit.


def test_gradients_are_clipped_only_where_the_update_is_normalised() -> None:
    clip = ["training.clip=0.5"]
    for optimizer in ("adamw", "muon", "muon_kimi"):
        spec = run(f"optimizer={optimizer}", *clip)
        assert clip_norm(spec.resolved) == build(spec, CPU).clip == 0.5
        assert audit(spec.resolved) == []
    sgd = run("optimizer=sgd", *clip)
    assert clip_norm(sgd.resolved) is None
    assert build(sgd, CPU).clip is None
    (note,) = audit(sgd.resolved)
    assert note.startswith("gradient clipping is off: the update of sgd has degree 1 in the gradient")
    assert clip_norm(run("training.clip=null").resolved) is None
    assert audit(run("optimizer=sgd", "training.clip=null").resolved) == []


def test_the_audit_names_settings_without_effect_or_against_the_rule() -> None:
    (note,) = audit(run("training.schedule=constant").resolved)
    assert note == "training.min_lr_frac has no effect: the schedule is constant"
    (note,) = audit(run("model.attention_scale=standard").resolved)
    assert "model.attention_scale" in note
    assert "standard" in note


# Initial values.


def test_a_tensor_starts_the_same_in_a_deeper_model_and_under_any_optimizer_or_lr() -> None:
    shallow = weights(build(run(), CPU))
    for other in (
        run("sweep.depth_ratios=[3]"),
        run("optimizer=muon"),
        run("sweep.log2_lrs=[-2]"),
        run("training.batch_size=2"),
        run("model.bias=true"),
    ):
        deep = weights(build(other, CPU))
        assert shallow.keys() <= deep.keys()
        for name, w in shallow.items():
            assert torch.equal(w, deep[name]), name


def test_the_rule_scales_the_same_draws() -> None:
    sp, mup = (weights(build(wide_and_deep(f"parametrization={p}"), CPU)) for p in ("sp", "spectral"))
    assert torch.equal(0.5 * sp["blocks.3.mlp.up.weight"], mup["blocks.3.mlp.up.weight"])
    assert torch.equal(sp["head.weight"], mup["head.weight"])


def test_seeds_and_names_draw_different_values() -> None:
    first, second = (weights(build(run(f"sweep.seeds=[{seed}]"), CPU)) for seed in (0, 1))
    matrices = [first[f"blocks.{i}.attention.{m}.weight"] for i in (0, 1) for m in ("query", "key", "value")]
    matrices += [second[f"blocks.{i}.attention.{m}.weight"] for i in (0, 1) for m in ("query", "key", "value")]
    for i, a in enumerate(matrices):
        for b in matrices[:i]:
            correlation = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
            assert abs(correlation) < TOLERANCE["std"] / WIDTH  # of WIDTH^2 entries


def test_building_twice_gives_the_same_bits_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = weights(build(run(), CPU))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert same(first, weights(build(run(), CPU)))


def test_plan_and_rules_of_every_choice_never_import_torch() -> None:
    code = """
import sys
sys.path.append(sys.argv[1])
from chosen import imports_foreign_code
from composition import compose_once
from mupsweep.sweep import config, plan, tensor_rules
config.compose = compose_once
for group in ("model", "optimizer", "parametrization"):
    for name in config.choices(group):
        if imports_foreign_code(group, name):
            continue
        for run in plan.plan(config.load([f"{group}={name}", "sweep.width_ratios=[2]", "sweep.log2_lrs=[-8]"])):
            assert tensor_rules.rules(run.resolved, run.size, run.base_lr)
            tensor_rules.audit(run.resolved)
heavy = {"torch", "transformers", "matplotlib", "wandb", "scipy"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code, str(Path(__file__).parents[1])], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
