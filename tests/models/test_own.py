"""Models of one's own: roles from shapes, their own bits at the base, forward constants folded where that is exact."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from own_model import MODEL, TINY
from torch import Tensor, nn

from mupsweep.errors import ConfigError
from mupsweep.models.inferred import family
from mupsweep.scaling import Fold, Init, Role
from mupsweep.sweep import plan, tensor_rules
from mupsweep.sweep.config import load
from mupsweep.sweep.run_identity import digest_of
from mupsweep.sweep.run_spec import RunSpec
from mupsweep.training.build import TrainingSetup, build
from mupsweep.training.trainer import clip, lr_factor, mean_loss

CPU = torch.device("cpu")
SAME = 2e-5  # of losses in fp32, the products being those of other numbers
Write = Callable[[str], None]


@pytest.fixture
def write(monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write `mine.py`, which can be imported from the working folder."""

    def to(text: str) -> None:
        Path("mine.py").write_text(text)
        monkeypatch.delitem(sys.modules, "mine", raising=False)

    return to


@pytest.fixture(autouse=True)
def mine(write: Write) -> None:
    write(MODEL)


def runs(function: str = "build", *overrides: str) -> dict[tuple[float, float], RunSpec]:
    """The runs of a plan, by ratios of width and depth."""
    planned = plan.plan(load([*TINY, f"model.path=mine:{function}", *overrides]))
    return {(run.size.width_ratio, run.size.depth_ratio): run for run in planned}


def batch(run: RunSpec, seed: int = 1) -> Tensor:
    shape = (run.resolved.training.batch_size, run.size.context + 1)
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(seed))


def steps(run: RunSpec, setup: TrainingSetup, count: int = 3) -> list[float]:
    """The losses of some training steps as the training loop takes them."""
    losses = []
    for step in range(count):
        loss = mean_loss(setup.network, "fp32", batch(run, step))
        loss.backward()
        clip(setup)
        setup.optimizer.step(lr_factor(step, run.resolved.steps, run.resolved.training))
        losses.append(loss.item())
    return losses


def test_roles_come_from_shapes_at_two_widths_and_depths() -> None:
    run = runs("build", "sweep.depth_ratios=[1,2]")[2.0, 2.0]
    tensors = {tensor.name: tensor for tensor in run.resolved.model.tensors(run.size)}
    roles = {family(name): tensor.role for name, tensor in tensors.items()}
    hidden = dict.fromkeys((f"blocks.#.{m}_proj.weight" for m in "qkvo"), Role.HIDDEN)
    assert roles.items() >= {**hidden, "blocks.#.up.weight": Role.HIDDEN, "blocks.#.fc2.weight": Role.HIDDEN}.items()
    assert (roles["tokens.weight"], roles["positions.weight"]) == (Role.INPUT, Role.INPUT)
    assert (roles["head.weight"], roles["norm.bias"]) == (Role.OUTPUT, Role.INPUT_VECTOR)
    assert roles["blocks.#.fc2.bias"] is roles["blocks.#.norm.weight"] is Role.HIDDEN_VECTOR
    assert [name for name in tensors if name.endswith("up.weight")] == [f"blocks.{i}.up.weight" for i in range(4)]
    assert tensors["blocks.3.up.weight"].shape == (128, 32)
    starts = {tensor.init for tensor in tensors.values()}
    assert starts == {Init.OWN, Init.ONES, Init.ZEROS}
    assert tensors["head.weight"].init_std == pytest.approx((3 * 16) ** -0.5, rel=0.05)  # torch's: uniform


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_at_the_base_shape_it_trains_the_bits_of_a_plain_loop(optimizer: str) -> None:
    run = replace(runs("build", f"optimizer={optimizer}")[1.0, 1.0], seed=3)
    ours = build(run, CPU)
    losses = steps(run, ours)

    from mine import build as model_of  # pyright: ignore[reportMissingImports]

    torch.manual_seed(3)
    model = model_of(16, 2, heads=2, vocab_size=256, context=8)
    [(section, _)] = run.resolved.optimizers
    if optimizer == "adamw":
        step = torch.optim.AdamW(model.parameters(), 2**-6, section.betas, section.eps, 0.0, fused=True)
    else:
        step = torch.optim.SGD(model.parameters(), 2**-6, section.momentum, nesterov=section.nesterov)
    for i, loss_of_ours in enumerate(losses):
        step.param_groups[0]["lr"] = 2**-6 * lr_factor(i, 3, run.resolved.training)
        tokens = batch(run, i)
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        step.zero_grad()
        loss.backward()
        if optimizer == "adamw":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step.step()
        assert loss.item() == loss_of_ours
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, ours.network.get_parameter(name)), name


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "lion", "muon"])
def test_folded_constants_train_as_those_in_the_forward_pass(optimizer: str) -> None:
    """Losses of the model without multipliers are those of the one with them, at four times the size."""
    words = [f"optimizer={optimizer}", "sweep.depth_ratios=[1,2]", "training.clip=null", "optimizer.weight_decay=0.1"]
    words += ["optimizer.momentum=0"] if optimizer == "sgd" else []
    losses = {}
    for function in ("build", "with_multipliers"):
        run = runs(function, *words)[2.0, 2.0]
        assert run.resolved.size(2.0, 2.0) == run.size
        losses[function] = steps(run, build(run, CPU))
    assert losses["build"] == pytest.approx(losses["with_multipliers"], rel=SAME)
    assert losses["build"][-1] != losses["build"][0]


def test_what_takes_a_constant_up_says_so_in_its_numbers() -> None:
    run = runs("build", "sweep.depth_ratios=[1,2]")[2.0, 2.0]
    rows = {row.name: row for row in tensor_rules.rules(run.resolved, run.size, 2**-6)}
    apart = runs("with_multipliers", "sweep.depth_ratios=[1,2]")[2.0, 2.0]
    others = {row.name: row for row in tensor_rules.rules(apart.resolved, apart.size, 2**-6)}
    for name, factor in (("head.weight", 0.5), ("blocks.1.fc2.weight", 0.5), ("blocks.1.o_proj.bias", 0.5)):
        folded, plain = rows[name], others[name]
        assert (folded.multiplier, plain.multiplier) == (1.0, 0.5)
        assert folded.init_std == pytest.approx(factor * plain.init_std)
        assert folded.lr == pytest.approx(factor * plain.lr)
        assert folded.eps == pytest.approx(plain.eps / factor)
    assert rows["blocks.1.up.weight"].lr == others["blocks.1.up.weight"].lr
    notes = " ".join(tensor_rules.audit(run.resolved))
    assert "no multiplier on its logits; where a size wants one, it is folded into head.weight" in notes
    assert tensor_rules.symbolic_rules(run.resolved)[Role.OUTPUT].rule.lr.exponents == {"r_n": "-1", "r_L": "0"}


def test_an_attention_scale_is_folded_into_queries_where_heads_widen() -> None:
    run = runs("wide_heads", "sweep.width_ratios=[1,4]")[4.0, 1.0]
    folds = {family(t.name): t.fold for t in run.resolved.model.tensors(run.size)}
    assert folds["blocks.#.q_proj.weight"] is folds["blocks.#.q_proj.bias"] is Fold.ATTENTION
    rows = {row.name: row for row in tensor_rules.rules(run.resolved, run.size, 2**-6)}
    assert rows["blocks.0.q_proj.weight"].init_std == pytest.approx(
        0.5 * rows["blocks.0.k_proj.weight"].init_std, rel=0.05
    )
    assert rows["blocks.0.q_proj.weight"].lr == pytest.approx(0.5 * rows["blocks.0.k_proj.weight"].lr)
    assert tensor_rules.multipliers(run.resolved, run.size).attention == pytest.approx(32**-0.5)


def test_initial_values_follow_the_rule_at_every_size() -> None:
    run = runs("build", "sweep.width_ratios=[1,8]")[8.0, 1.0]
    network, rows = build(run, CPU).network, tensor_rules.rules(run.resolved, run.size, 2**-6)
    for row in rows:
        values = network.get_parameter(row.name).detach()
        if row.init is Init.OWN:
            blocks = [network.get_parameter(r.name) for r in rows if family(r.name) == family(row.name)]
            rms = torch.stack([p.detach() for p in blocks]).square().mean().sqrt().item()
            assert rms == pytest.approx(row.init_std, rel=1e-5), row.name
        else:
            assert (values == (1.0 if row.init is Init.ONES else 0.0)).all()
    (base_std,) = {row.init_std for row in rows if row.name == "blocks.0.up.weight"}
    assert base_std == pytest.approx((3 * 16) ** -0.5 * 8**-0.5, rel=0.05)


def test_names_overrule_shapes() -> None:
    run = runs("build", "model.roles={positions.weight:input_vector}")[1.0, 1.0]
    roles = {tensor.name: tensor.role for tensor in run.resolved.model.tensors(run.size)}
    assert roles["positions.weight"] is Role.INPUT_VECTOR
    with pytest.raises(ConfigError, match=r"model\.roles: the pattern 'position\.weight' fits no tensor"):
        runs("build", "model.roles={position.weight:input}")


def test_a_changed_text_is_another_run(write: Write) -> None:
    def digest() -> str:
        return digest_of(load([*TINY, "model.path=mine:build"]).variants[0])

    Path("parts.py").write_text("from torch import nn\n")
    write("from parts import nn\n" + MODEL)
    first = digest()
    assert digest() == first
    write("from parts import nn\n" + MODEL + "\n")
    second = digest()
    Path("parts.py").write_text("from torch import nn  # another text\n")
    sys.modules.pop("parts")
    write("import parts\n" + MODEL)
    third = digest()
    Path("parts.py").write_text("from torch import nn  # a third text\n")
    assert len({first, second, third, digest()}) == 4
    sys.modules.pop("parts")


def edited(old: str, new: str) -> str:
    assert old in MODEL
    return MODEL.replace(old, new)


UNSEEDED = "self.positions.weight.data += torch.rand(1, generator=torch.Generator().manual_seed(time.time_ns()))"
BAD = {
    "a tuple": (
        edited("return self.output_scale *", "return 0, self.output_scale *"),
        r"returns a tuple: return the logits",
    ),
    "an output": (
        edited(
            "        return self.output_scale * self",
            "        from types import SimpleNamespace\n        return SimpleNamespace(logits=self",
        ).replace("(self.norm(x))\n\n\ndef build", "(self.norm(x)))\n\n\ndef build"),
        r"returns a SimpleNamespace: return the logits alone",
    ),
    "no module": (
        edited("    return Net(width, depth, heads, vocab_size, context)\n\n\ndef with", "    return 1\n\n\ndef with"),
        r"returns int: expected a torch\.nn\.Module",
    ),
    "a changing buffer": (
        edited(
            "        for block in self.blocks:\n", "        self.count += 1\n        for block in self.blocks:\n"
        ).replace(
            'self.register_buffer("index"',
            'self.register_buffer("count", torch.zeros(1))\n        self.register_buffer("index"',
        ),
        r"a forward pass changes its buffer count: only constant buffers",
    ),
    "a refused width": (
        edited(
            "def build(width, depth, heads, vocab_size, context):\n",
            "def build(width, depth, heads, vocab_size, context):\n    assert width != 64, 'not this one'\n",
        ),
        r"model\.path=mine:build at width 64, depth 2: AssertionError: not this one",
    ),
    "three axes": (
        edited(
            "        self.norm, self.head",
            "        self.mix = nn.Parameter(torch.zeros(width, width, width))\n        self.norm, self.head",
        ),
        r"mix grows along 3 axes: keep all but 2 fixed",
    ),
    "an unseeded start": (
        "import time\n" + edited("        self.norm, self.head", f"        {UNSEEDED}\n        self.norm, self.head"),
        r"is not deterministic: positions\.weight starts at other values under the same seed",
    ),
    "dropout": (
        edited(
            "        for block in self.blocks:\n", "        x = self.dropout(x)\n        for block in self.blocks:\n"
        ).replace(
            "        self.norm, self.head", "        self.dropout = nn.Dropout(0.1)\n        self.norm, self.head"
        ),
        r"is not deterministic: the same tokens have other logits the second time; set dropout to 0, such as dropout",
    ),
    "the future": (edited("is_causal=True", "is_causal=False"), r"a token sees the tokens behind it"),
    "an idle parameter": (
        edited(
            "        self.norm, self.head", "        self.idle = nn.Linear(width, width)\n        self.norm, self.head"
        ),
        r"idle\.weight has no gradient, so the logits do not depend on it",
    ),
    "a small vocabulary": (
        edited("nn.Linear(width, vocab_size, bias=False)", "nn.Linear(width, 100, bias=False)"),
        r"returns logits of shape \(2, 8, 100\)",
    ),
    "half precision": (
        edited("bias=False)\n", "bias=False).half()\n"),
        r"head\.weight is torch\.float16: every parameter is trained, in float32",
    ),
    "a frozen tensor": (
        edited(
            "        self.norm, self.head", "        self.tokens.requires_grad_(False)\n        self.norm, self.head"
        ),
        r"tokens\.weight is frozen",
    ),
    "another argument": (
        edited("def build(width, depth, heads, vocab_size, context)", "def build(width, depth, heads, size, context)"),
        r"needs 'size': it gets width, depth and",
    ),
    "no width": (
        edited(
            "    return Net(width, depth, heads, vocab_size, context)\n\n\ndef with",
            "    return Net(16, depth, 2, vocab_size, context)\n\n\ndef with",
        ),
        r"no tensor is larger at twice the width, so it ignores the width",
    ),
    "no depth": (
        edited("for _ in range(depth))\n        self.norm", "for _ in range(2))\n        self.norm"),
        r"at 2 times the depth it has 1 times the numbered blocks",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_model_that_cannot_be_trained_is_refused_in_one_line(what: str, write: Write) -> None:
    text, message = BAD[what]
    write(text)
    with pytest.raises(ConfigError, match=message) as caught:
        runs("build", "sweep.width_ratios=[1,4]", "sweep.depth_ratios=[1,2]")
    assert "\n" not in str(caught.value)


def test_a_constant_that_nothing_can_take_up_is_refused_with_the_reason(write: Write) -> None:
    tied = edited("bias=False)\n", "bias=False)\n        self.head.weight = self.tokens.weight\n")
    write(tied)
    assert runs("build", "sweep.width_ratios=[1]")
    with pytest.raises(
        ConfigError,
        match="the head shares the storage of an embedding; give the function an argument output_multiplier, or",
    ):
        runs("build")
    write(edited("self.output_scale * self.head(self.norm(x))", "self.head(self.norm(x)).tanh()"))
    with pytest.raises(ConfigError, match=r"logits are no linear function of head\.weight"):
        runs("build")
    write(MODEL.replace("fc2", "lower"))
    assert runs("build")
    with pytest.raises(ConfigError, match=r"a block is not the identity without blocks\.#\.o_proj\.weight"):
        runs("build", "sweep.depth_ratios=[1,2]")
    assert runs("build", "sweep.depth_ratios=[1,2]", "model.branch_ends=['*.o_proj','*.lower']")
    with pytest.raises(ConfigError, match=r"o_proj\.weight would have to take up .* norm of its own"):
        runs("build", "sweep.depth_ratios=[1,2]", "model.branch_ends=['*.o_proj','*.lower']", "optimizer=sso")


def test_the_vocabulary_and_the_sequences_are_those_of_the_sweep(write: Write) -> None:
    write(
        edited("nn.Embedding(context, width)", "nn.Embedding(4, width)").replace(
            "torch.arange(context)", "torch.arange(8)"
        )
    )
    with pytest.raises(ConfigError, match=r"cannot read 2 sequences of 8 tokens, 0 to 255: IndexError"):
        runs("build")


def test_a_stored_model_runs_on_more_than_one_device_but_is_not_sharded() -> None:
    with pytest.raises(ConfigError, match=r"launcher\.shard=true divides the models of mupsweep only"):
        runs("build", "launcher.devices_per_run=2", "launcher.shard=true")
    assert runs("build", "launcher.devices_per_run=2")


def test_sampled_labels_have_the_loss_of_their_own_predictions() -> None:
    run = runs()[1.0, 1.0]
    network, tokens = build(run, CPU).network, batch(run)[:, :-1]
    draws = torch.full_like(tokens, 2**30)
    loss = network(tokens, draws=draws)
    with torch.no_grad():
        p = network(tokens).flatten(0, 1).softmax(dim=1)
        medians = (p.cumsum(dim=1) > 0.5).int().argmax(dim=1)
    assert loss.item() == pytest.approx(-p.gather(1, medians[:, None]).log().mean().item(), rel=1e-3)
    assert math.isfinite(loss.item())
