"""How features of a fixed number move with the width under the rule of each role: low-rank latents, keys, routers.

Trains transformers' DeepSeek V3 and Llama for a few steps at widths 64 to 512 by AdamW under muP, with groups, init and
multipliers of `mupsweep.param_groups`, and prints per tensor and role the exponents in the width of its output's RMS at
the start and of the output's change. Figures in mupsweep/models/ROLES.md come from here.

    python scripts/measure_roles.py
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

import mupsweep
from mupsweep.check.regression import slope
from mupsweep.training.norms import rms_norm

WIDTHS, SEEDS, STEPS, LR = (64, 128, 256, 512), (0, 1, 2), 8, 2.0**-7
VOCAB, HEAD_DIM, KV_HEADS = 256, 16, 2
TOKENS = torch.randint(VOCAB, (16, 33), generator=torch.Generator().manual_seed(0))
WATCHED = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "k_proj", "v_proj", "mlp.gate")


def deepseek(width: int) -> nn.Module:
    sizes = {"moe_intermediate_size": width, "num_key_value_heads": width // HEAD_DIM, "first_k_dense_replace": 1}
    ranks = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "n_shared_experts": 1}
    return network("DeepseekV3", width, sizes | ranks | experts)


def llama(width: int) -> nn.Module:
    return network("Llama", width, {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM})


def network(kind: str, width: int, keys: Mapping[str, int]) -> nn.Module:
    heads = {"num_attention_heads": width // HEAD_DIM, "num_hidden_layers": 3}
    sizes = {"vocab_size": VOCAB, "hidden_size": width, "intermediate_size": 3 * width}
    config = getattr(transformers, f"{kind}Config")(**heads, **sizes, **keys)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def outputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """What the watched modules of the last block return on the tokens; of a router its logits."""
    seen: dict[str, torch.Tensor] = {}
    handles = []
    for name, module in model.named_modules():
        ending = next((w for w in WATCHED if name.endswith(f".{w}")), None)
        if ending and name.startswith("model.layers.2."):

            def keep(module: Any, inputs: tuple[torch.Tensor, ...], _: object, ending: str = ending) -> None:
                seen[ending] = nn.functional.linear(inputs[0].flatten(0, -2), module.weight).detach()

            handles.append(module.register_forward_hook(keep))
    with torch.no_grad():
        model(TOKENS[:, :-1])
    for handle in handles:
        handle.remove()
    return seen


def measured(
    build: Callable[[int], nn.Module], width: int, roles: Mapping[str, str], seed: int
) -> dict[str, tuple[float, float]]:
    """Per watched module (RMS of its output at the start, RMS of the output's change)."""
    with torch.device("meta"):
        base, delta = build(WIDTHS[0]), build(WIDTHS[1])
    torch.manual_seed(seed)
    model = build(width)
    groups = mupsweep.param_groups(model, base, lr=LR, roles=roles, delta_model=delta, details=True)
    for group in groups:
        for p in group["params"] if group["role"] not in ("input_vector", "hidden_vector") else ():
            p.data.mul_(group["init_std_ratio"])
    (logits,) = {g["multiplier"] for g in groups if g["role"] == "output" and "lm_head.weight" in g["names"]}
    model.get_submodule("lm_head").register_forward_hook(lambda _, __, output: output * logits)
    start = outputs(model)
    adam = torch.optim.AdamW(
        [{k: g[k] for k in ("params", "lr", "weight_decay", "eps")} for g in groups], betas=(0.9, 0.95)
    )
    for _ in range(STEPS):
        adam.zero_grad()
        logits_out = model(TOKENS[:, :-1]).logits
        nn.functional.cross_entropy(logits_out.flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
        adam.step()
    end = outputs(model)
    return {name: (rms_norm(start[name]), rms_norm(end[name] - start[name])) for name in start}


def exponent(values: Mapping[int, list[float]]) -> float:
    """Of the width, over all seeds."""
    return slope([w for w in WIDTHS for _ in values[w]], [value for w in WIDTHS for value in values[w]]).value


def main() -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    cases = [
        (deepseek, {}),
        (deepseek, {"*_a_proj*.weight": "router"}),
        (deepseek, {"*_a_proj*.weight": "output"}),
        (deepseek, {"*.mlp.gate.weight": "hidden"}),
        (deepseek, {"*.mlp.gate.weight": "output"}),
        (llama, {}),
        (llama, {"*.k_proj.weight": "output", "*.v_proj.weight": "output"}),
    ]
    for build, roles in cases:
        runs: dict[str, tuple[dict[int, list[float]], dict[int, list[float]]]] = {}
        for width in WIDTHS:
            for seed in SEEDS:
                for name, sizes in measured(build, width, roles, seed).items():
                    per_width = runs.setdefault(name, (defaultdict(list), defaultdict(list)))
                    for kept, size in zip(per_width, sizes, strict=True):
                        kept[width].append(size)
        print(build.__name__, roles or "as inferred")
        for name, (start, change) in runs.items():
            print(f"  {name:20} start {exponent(start):+.2f}  change {exponent(change):+.2f}")


if __name__ == "__main__":
    main()
