"""NanoGPT against transformers' GPT-2 and a forward pass written out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from tiny import network, tokens
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from mupsweep.models import Multipliers
from mupsweep.models.nanogpt import NanoGPT
from mupsweep.models.shape import Size
from mupsweep.scaling import Init

TOLERANCE = {
    "logits": 1e-5,  # fp32, logits of size 1
    "loss": 2e-6,  # fp32, a loss of about 4
    "float64": 1e-12,
}


def nanogpt(
    *, width: int = 32, depth: int = 2, head_dim: int = 8, vocab: int = 71, context: int = 16, **keys: object
) -> tuple[NanoGPT, Size]:
    model = NanoGPT(name="nanogpt", width=width, depth=depth, head_dim=head_dim, context=context, **keys)  # type: ignore[arg-type]
    return model, model.base.scaled(1.0, 1.0, vocab)


def transformers_gpt2(size: Size, ours: dict[str, Tensor], tied: bool) -> GPT2LMHeadModel:
    """GPT-2 as transformers builds it, with our weights."""
    gpt2 = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=size.vocab_size,
            n_positions=size.context,
            n_embd=size.width,
            n_layer=size.depth,
            n_head=size.heads,
            n_inner=size.ffn_width,
            activation_function="gelu_new",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            tie_word_embeddings=tied,
            attn_implementation="eager",
        )
    ).eval()
    theirs = {
        "transformer.wte.weight": ours["token_embedding.weight"],
        "transformer.wpe.weight": ours["position_embedding.weight"],
        "transformer.ln_f.weight": ours["norm.weight"],
        "transformer.ln_f.bias": ours["norm.bias"],
        "lm_head.weight": ours["head.weight"],
    }
    for i in range(size.depth):
        h, b = f"transformer.h.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            fused = ours.get(f"{b}.attention.qkv.{kind}")
            split = [ours.get(f"{b}.attention.{m}.{kind}") for m in ("query", "key", "value")]
            qkv = torch.cat(split) if fused is None else fused  # type: ignore[arg-type]
            theirs[f"{h}.ln_1.{kind}"] = ours[f"{b}.attention_norm.{kind}"]
            theirs[f"{h}.attn.c_attn.{kind}"] = qkv.T if kind == "weight" else qkv
            theirs[f"{h}.ln_2.{kind}"] = ours[f"{b}.mlp_norm.{kind}"]
            for name, mine in (
                ("attn.c_proj", "attention.output"),
                ("mlp.c_fc", "mlp.up"),
                ("mlp.c_proj", "mlp.down"),
            ):
                w = ours[f"{b}.{mine}.{kind}"]
                theirs[f"{h}.{name}.{kind}"] = w.T if kind == "weight" else w  # Conv1D stores (n_in, n_out)
    gpt2.load_state_dict(theirs)
    return gpt2


def written_out(w: dict[str, Tensor], size: Size, m: Multipliers, ids: Tensor) -> Tensor:
    """The forward pass of a NanoGPT without biases, from the definition."""
    T = ids.shape[1]

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain

    def gelu(x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    x = w["token_embedding.weight"][ids] + w["position_embedding.weight"][:T]
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    for i in range(size.depth):
        b = f"blocks.{i}"
        h = norm(x, w[f"{b}.attention_norm.weight"])
        q, k, v = (h @ w[f"{b}.attention.{name}.weight"].T for name in ("query", "key", "value"))
        heads = []
        for j in range(size.heads):
            head = slice(j * size.head_dim, (j + 1) * size.head_dim)
            scores = m.attention * q[..., head] @ k[..., head].mT
            heads.append(scores.masked_fill(future, -math.inf).softmax(-1) @ v[..., head])
        x = x + m.block * torch.cat(heads, -1) @ w[f"{b}.attention.output.weight"].T
        h = norm(x, w[f"{b}.mlp_norm.weight"])
        x = x + m.block * gelu(h @ w[f"{b}.mlp.up.weight"].T) @ w[f"{b}.mlp.down.weight"].T
    return m.output * norm(x, w["norm.weight"]) @ w["head.weight"].T


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("shape", "length"),
    [
        ({}, 16),
        ({"head_dim": 32}, 16),  # one head
        ({"head_dim": 4, "depth": 3}, 16),
        ({"width": 48, "head_dim": 16, "vocab": 130}, 16),
        ({"heads": 2, "width": 24}, 16),
        ({"ffn_ratio": 2.5}, 16),
        ({"context": 32}, 7),  # shorter than the longest
        ({"depth": 1}, 1),
        ({"projections": "fused", "width": 48}, 16),
    ],
    ids=str,
)
def test_logits_equal_those_of_transformers_gpt2(shape: dict[str, int], length: int, tied: bool) -> None:
    model, size = nanogpt(bias=True, tied=tied, **shape)  # type: ignore[arg-type]
    ours = network(model, size)
    gpt2 = transformers_gpt2(size, ours.state_dict(), tied)
    ids = tokens(size, length=length)
    with torch.no_grad():
        expected, got = gpt2(ids).logits, ours(ids)
    assert expected.std() > 0.5  # the comparison is of numbers that matter
    torch.testing.assert_close(got, expected, rtol=TOLERANCE["logits"], atol=TOLERANCE["logits"])


@pytest.mark.parametrize("heads", [{"head_dim": 8}, {"heads": 2}], ids=str)
@pytest.mark.parametrize("block", [1.0, 0.3])
@pytest.mark.parametrize("output", [1.0, 0.2])
def test_the_block_multiplier_scales_both_branches_and_the_output_multiplier_the_logits(
    heads: dict[str, int], block: float, output: float
) -> None:
    model, size = nanogpt(**heads)  # type: ignore[arg-type]
    multipliers = Multipliers(block, output, attention=0.7)
    net = network(model, size, multipliers).double()
    ids = tokens(size)
    with torch.no_grad():
        got, expected = net(ids), written_out(net.state_dict(), size, multipliers, ids)
    torch.testing.assert_close(got, expected, rtol=TOLERANCE["float64"], atol=TOLERANCE["float64"])


def test_a_block_multiplier_of_zero_leaves_only_the_embedding() -> None:
    model, size = nanogpt()
    net = network(model, size, Multipliers(0.0, 1.0, 1.0))
    ids = tokens(size)
    with torch.no_grad():
        w = net.state_dict()
        x = w["token_embedding.weight"][ids] + w["position_embedding.weight"]
        x = F.layer_norm(x, (size.width,), w["norm.weight"])
        assert torch.equal(net(ids), F.linear(x, w["head.weight"]))


def test_an_output_multiplier_of_a_power_of_two_scales_the_logits_bit_for_bit() -> None:
    model, size = nanogpt()
    ids = tokens(size)
    with torch.no_grad():
        plain = network(model, size, Multipliers(1.0, 1.0, 0.3))(ids)
        assert torch.equal(network(model, size, Multipliers(1.0, 0.25, 0.3))(ids), 0.25 * plain)


@pytest.mark.parametrize("output", [1.0, 0.25])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_loss_is_the_cross_entropy_of_the_logits(output: float, tied: bool) -> None:
    model, size = nanogpt(bias=True, tied=tied)
    net = network(model, size, Multipliers(1.0, output, 0.3))
    ids, targets = tokens(size), tokens(size).roll(5)
    expected = F.cross_entropy(net(ids).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(net(ids, targets), expected, rtol=0, atol=TOLERANCE["loss"])


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_gradients_of_the_loss_are_those_of_the_cross_entropy_of_the_logits(tied: bool) -> None:
    model, size = nanogpt(bias=True, tied=tied)
    net = network(model, size, Multipliers(0.5, 0.25, 0.3))
    ids, targets = tokens(size), tokens(size).roll(5)
    parameters = dict(net.named_parameters())
    assert len(parameters) == sum(t.tied_to is None for t in model.tensors(size))
    expected = torch.autograd.grad(
        F.cross_entropy(net(ids).flatten(0, 1), targets.flatten()), list(parameters.values())
    )
    got = torch.autograd.grad(net(ids, targets), list(parameters.values()))
    for name, mine, reference in zip(parameters, got, expected, strict=True):
        assert reference.abs().max() > 0, name
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=TOLERANCE["loss"], msg=name)


@pytest.mark.parametrize("power", [-0.5, -1.0])
def test_the_attention_scale_at_the_base_is_one_over_the_root_of_the_head_dimension(power: float) -> None:
    for head_dim in range(8, 129):
        model, size = nanogpt(width=2 * head_dim, head_dim=head_dim)
        scale = model.multipliers(size, 1.0, 1.0, power).attention
        assert scale == head_dim**-0.5
        assert torch.tensor(scale) == torch.tensor(1 / math.sqrt(head_dim))  # the fp32 number that torch defaults to


@pytest.mark.parametrize(
    ("forced", "power", "expected"),
    [
        ("parametrization", -0.5, 1 / math.sqrt(32)),
        ("parametrization", -1.0, math.sqrt(8) / 32),
        ("standard", -1.0, 1 / math.sqrt(32)),
        ("mup", -0.5, math.sqrt(8) / 32),
    ],
)
def test_a_growing_head_follows_the_power_of_its_scale(forced: str, power: float, expected: float) -> None:
    model, size = nanogpt(width=16, heads=2, attention_scale=forced)
    assert size.head_dim == 8
    wide = model.base.scaled(4.0, 1.0, size.vocab_size)
    assert wide.head_dim == 32
    assert model.multipliers(wide, 1.0, 1.0, power).attention == pytest.approx(expected, rel=1e-15)


def test_tuned_multipliers_stand_beside_the_rule() -> None:
    model, size = nanogpt(block_multiplier=0.5, output_multiplier=3.0)
    got = model.multipliers(size, 0.25, 0.125, -0.5)
    assert (got.block, got.output) == (0.125, 0.375)


@pytest.mark.parametrize(
    ("tied", "parameters"), [(True, 124_439_808), (False, 124_439_808 + 50_257 * 768)], ids=["tied", "untied"]
)
def test_gpt2_has_as_many_parameters_as_in_transformers(tied: bool, parameters: int) -> None:
    size = Size(
        width=768, depth=12, heads=12, kv_heads=12, head_dim=64, ffn_width=3072, vocab_size=50_257, context=1024
    )
    table = NanoGPT(name="gpt2", width=768, depth=12, bias=True, tied=tied).tensors(size)
    assert sum(math.prod(t.shape) for t in table if t.tied_to is None) == parameters
    with torch.device("meta"):
        gpt2 = GPT2LMHeadModel(GPT2Config(tie_word_embeddings=tied))
    assert gpt2.num_parameters() == parameters


def test_a_head_of_zeros_and_a_head_of_its_own_std_are_declared() -> None:
    for std, init in ((0.0, Init.ZEROS), (0.5, Init.NORMAL)):
        model, size = nanogpt(head_init_std=std)
        head = list(model.tensors(size))[-1]
        assert (head.name, head.init, head.init_std) == ("head.weight", init, std)
