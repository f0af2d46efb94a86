"""The scaling rules of a sweep as tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mupsweep.optimizers.muon import SHAPE_FACTORS, Muon, convert
from mupsweep.report.terminal.console import console_of, table_of
from mupsweep.scaling import WEIGHT_DECAY_RULES, Role
from mupsweep.sweep.config import SweepConfig
from mupsweep.sweep.run_spec import ResolvedVariant, resolve
from mupsweep.sweep.tensor_rules import TensorRule, audit, multipliers, rule_record, rules, symbolic_rules, wrong_rule

RULE_KEYS = ("multiplier", "init_std", "lr", "weight_decay", "eps")


def show_rules(config: SweepConfig, as_json: bool, per_tensor: bool) -> None:
    """Print the scaling rules of every variant: exponents per role, numbers per size, and the audit."""
    resolved_variants = [resolve(variant) for variant in config.variants]
    if as_json:
        documents = [_document(resolved, config) for resolved in resolved_variants]
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
        return
    console = console_of()
    for resolved in resolved_variants:
        log2_lr = _middle_log2_lr(resolved, config)
        console.print(f"\n{'/'.join(resolved.variant.label)}", style="bold")
        console.show(_symbol_table(resolved))
        for r_n, r_L in config.sweep.ratios:
            size = resolved.size(r_n, r_L)
            rows = rules(resolved, size, 2.0**log2_lr)
            attention = multipliers(resolved, size).attention
            console.print(
                f"width {size.width} (x{r_n:g}), depth {size.depth} (x{r_L:g}), base LR 2^{log2_lr:g}, "
                f"attention scale {attention:.4g}"
            )
            console.show(_rule_table(rows, per_tensor))
            if conventions := muon_conventions(resolved, rows):
                console.print("the LR with which the other conventions of Muon take the same step:")
                console.show(_convention_table(conventions))
        for note in audit(resolved):
            console.say(f"note: {note}")
    console.say("audit: every tensor has one role, one optimizer and one LR; no contradiction found")


def _middle_log2_lr(resolved: ResolvedVariant, config: SweepConfig) -> float:
    """The middle one of a variant's base LRs."""
    lrs = sorted(config.sweep.of(resolved.variant.optimizer).log2_lrs)
    return lrs[len(lrs) // 2]


def _document(resolved: ResolvedVariant, config: SweepConfig) -> dict[str, Any]:
    """What `mupsweep rules --json` prints of a variant."""
    model, optimizer, parametrization = resolved.variant.names
    roles = {}
    for role, scaling in symbolic_rules(resolved).items():
        rule = scaling.rule
        roles[role.value] = {
            "optimizer": scaling.scaled.optimizer.name,
            "multiplier": rule.multiplier.exponents,
            "init_var": (rule.init_std**2).exponents,
            **{key: getattr(rule, key).exponents for key in ("lr", "weight_decay", "eps")},
            "thresholds": {name: monomial.exponents for name, monomial in scaling.thresholds.items()},
        }
    sizes = []
    for r_n, r_L in config.sweep.ratios:
        size = resolved.size(r_n, r_L)
        rows = rules(resolved, size, 2.0 ** _middle_log2_lr(resolved, config))
        sizes.append(
            {
                "width": size.width,
                "depth": size.depth,
                "width_ratio": float(r_n),
                "depth_ratio": float(r_L),
                "attention_scale": multipliers(resolved, size).attention,
                "tensors": [rule_record(row) for row in rows],
                "muon_conventions": muon_conventions(resolved, rows),
            }
        )
    return {
        "model": model,
        "optimizer": optimizer,
        "parametrization": parametrization,
        "roles": roles,
        "sizes": sizes,
        "audit": audit(resolved),
    }


def _symbol_table(resolved: ResolvedVariant) -> Table:
    """A row per role with its rule as monomials in r_n and r_L."""
    scalings = symbolic_rules(resolved)
    names = sorted({name for scaling in scalings.values() for name in scaling.thresholds})
    table = table_of("role", "optimizer", "multiplier", "init std", "LR", "weight decay", "eps", *names)
    decay_rule = WEIGHT_DECAY_RULES[resolved.parametrization.weight_decay_rule]
    forced = resolved.variant.parametrization.get("update_law_of")
    for role, scaling in scalings.items():
        monomials = [getattr(scaling.rule, key) for key in RULE_KEYS]
        if role not in decay_rule.roles:
            monomials[RULE_KEYS.index("weight_decay")] = 0
        monomials += [scaling.thresholds.get(name, "") for name in names]
        optimizer = scaling.scaled.optimizer
        note = f" (WRONG: {forced}'s rule)" if wrong_rule(resolved, optimizer) else ""
        table.add_row(role.value, optimizer.name + note, *map(str, monomials))
    return table


def _rule_table(rows: Sequence[TensorRule], per_tensor: bool) -> Table:
    """The numbers at one size, a row per tensor or one for all tensors of a role with one shape and rule."""
    names = sorted({name for row in rows for name in row.thresholds})
    table = table_of(
        "tensor" if per_tensor else "role",
        "shape",
        "optimizer",
        "init std",
        "multiplier",
        "LR",
        "weight decay",
        "LR x decay",
        "eps",
        *names,
    )
    printed: dict[tuple[str, ...], None] = {}  # without repeats: equal numbers may differ in their last bit
    for row in rows:
        name = row.name if per_tensor else row.role.value
        std = f"{row.init_std:.4g}" if row.init.value in ("normal", "own") else row.init.value
        numbers = (row.multiplier, row.lr, row.weight_decay, row.decay_per_step, row.eps)
        thresholds = (f"{row.thresholds[n]:.4g}" if n in row.thresholds else "" for n in names)
        cells = (name, "x".join(map(str, row.shape)), row.optimizer, std, *(f"{x:.4g}" for x in numbers), *thresholds)
        printed[cells] = None
    for cells in printed:
        table.add_row(*cells)
    return table


def muon_conventions(resolved: ResolvedVariant, rows: Sequence[TensorRule]) -> list[dict[str, Any]]:
    """For every shape that a plain Muon updates, the LR that takes an equal step in each convention."""
    conventions: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in rows:
        muon = resolved.optimizer_for(row.role).optimizer
        if isinstance(muon, Muon) and not muon.composed:
            n_out, n_in = row.shape[::-1] if row.role is Role.INPUT else row.shape
            lrs = {target: convert(row.lr, muon.scaling, target, n_out, n_in) for target in SHAPE_FACTORS}
            conventions[n_out, n_in, row.lr] = {"n_out": n_out, "n_in": n_in, "scaling": muon.scaling, **lrs}
    return list(conventions.values())


def _convention_table(conventions: Sequence[dict[str, Any]]) -> Table:
    """A row per shape, a column per convention, with torch.optim.Muon's name where it has one."""
    torch_names = {"jordan": " (torch: original)", "kimi": " (torch: match_rms_adamw)"}
    table = table_of("n_out x n_in", *(name + torch_names.get(name, "") for name in SHAPE_FACTORS))
    for row in conventions:
        table.add_row(f"{row['n_out']}x{row['n_in']}", *(f"{row[name]:.4g}" for name in SHAPE_FACTORS))
    return table
