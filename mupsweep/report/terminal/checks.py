"""The output of the check commands: tables of exponents for people, JSON for scripts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mupsweep.atomic_files import make_folder, write_json
from mupsweep.check import update_law
from mupsweep.check.exponents import TOLERANCE, WEIGHT, WRONG_RULE, Coordinates, Row, kind_of_blocks
from mupsweep.check.measure import CHANGE, UPDATE
from mupsweep.check.regression import Exponent, signed
from mupsweep.check.update_law import Measured
from mupsweep.formatting import counted, verb
from mupsweep.optimizers import Optimizer
from mupsweep.optimizers.foreign import Foreign
from mupsweep.report.terminal.console import console_of, table_of
from mupsweep.scaling import Parametrization, Role, UpdateLaw, symbolic
from mupsweep.schema import instantiate
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep.config import SweepConfig

SP = "sp"


def show_coordinates(
    checked: Iterable[Coordinates], as_json: bool, figure: str | None = None, into: SweepDir | None = None
) -> bool:
    """Print the exponents of every variant with those of SP beside them; returns whether all promises are kept.

    Args:
        checked: measured variants; measuring happens while they are iterated.
        as_json: print JSON instead of tables.
        figure: path of a figure to draw.
        into: the sweep that the measurements are stored with.
    """
    if figure is not None:
        from mupsweep.report.figures.coordinates import check

        check(Path(figure))  # refuse a bad path before anything is trained
    variants = list(checked)
    document = {"variants": [_document(variant) for variant in variants]}
    if into is not None:
        make_folder(into.results)
        write_json(into.check_path, document)
    if figure is not None:
        from mupsweep.report.figures.coordinates import draw

        draw(variants, Path(figure))
    if as_json:
        print(json.dumps(document))
        return all(variant.passed for variant in variants)
    console = console_of()
    sp_variants = {variant.label[:2]: variant for variant in variants if variant.label[2] == SP}
    for variant in [variant for variant in variants if variant.label[2] != SP] or variants:
        console.print(f"\n{'/'.join(variant.label)}, base LR 2^{variant.log2_lr:g}", style="bold")
        sp = sp_variants.get(variant.label[:2])
        for axis in variant.axes():
            console.show(_coordinates_table(variant, None if sp is variant else sp, axis))
        for line in _conclusion(variant):
            console.say(line)
    if into is not None:
        console.print(f"wrote {into.check_path}; mupsweep report {shlex.quote(str(into.path))} shows it")
    return all(variant.passed for variant in variants)


def _coordinates_table(variant: Coordinates, sp: Coordinates | None, axis: str) -> Table:
    """A row per quantity and role: its exponent after every number of steps, and whether the last keeps its promise."""
    rows = [row for row in variant.by_role(axis) if _is_shown(row)]
    # weights have an exponent at the start only, changes and updates after some steps only
    counts = sorted({count for row in rows for count in row.exponents if (row.quantity == WEIGHT) == (count == 0)})
    steps = [f"after {count}" if count else "start" for count in counts]
    table = table_of(f"exponent of the {axis}", *steps, "95 % interval", "promise", *(["sp"] if sp else []), "")
    sp_exponents = (
        {(row.quantity, row.role): signed(row.final_exponent.value) for row in sp.by_role(axis)} if sp else {}
    )
    for row in rows:
        exponents = {c: e for c, e in row.exponents.items() if (row.quantity == WEIGHT) == (c == 0)}
        cells = [signed(exponents[c].value) if c in exponents else "" for c in counts]
        sp_cells = [sp_exponents.get((row.quantity, row.role), "")] if sp else []
        table.add_row(
            row.quantity if row.role is None else f"{row.quantity} {row.role.value}",
            *cells,
            f"{signed(row.final_exponent.low)}..{signed(row.final_exponent.high)}",  # in 80 columns
            "" if row.expected is None else str(row.expected),
            *sp_cells,
            _verdict(variant, row),
        )
    return table


def _verdict(variant: Coordinates, row: Row) -> str:
    """Whether the tensors of a role keep their promise, the one that misses it most, or that nothing can be told."""
    if row.expected is None:
        return ""
    violating = [violation for violation in variant.violations if _key(violation) == _key(row)]
    if violating:
        return f"off {violating[0].tensor}".strip()
    return "too wide" if row.too_wide else "ok"


def _is_shown(row: Row) -> bool:
    """Whether tables contain the row: changes, updates, and weights at the start."""
    return row.quantity in (UPDATE, WEIGHT) or row.quantity.startswith(CHANGE)


def _conclusion(variant: Coordinates) -> list[str]:
    """The lines under a variant's tables: likely causes of violations, and whether it passed."""
    lines = [line] if (line := kind_of_blocks(variant)) else []
    judged = [row for axis in variant.axes() for row in variant.by_role(axis) if row.expected is not None]
    missed = {(row.axis, row.quantity, row.role) for row in variant.violations}
    for axis in variant.axes():
        if not variant.has_expectation(axis):
            lines.append(f"{variant.label[2]} promises nothing along the {axis}")
    lines += variant.causes()
    if variant.failed:
        promises = f"{len(missed)} of {counted(len(judged), 'promise')} {verb(len(missed), 'are')}"
        missed_text = f"{promises} missed by more than {TOLERANCE:g}"
        return [*lines, f"FAILED: {missed_text if missed else 'some runs diverged'}"]
    if variant.inconclusive:
        wide = len(variant.inconclusive)
        lines.append(
            f"INCONCLUSIVE: {wide} of {counted(len(judged), 'interval')} {verb(wide, 'are')} wider than "
            f"{WRONG_RULE:g}, by which wrong rules err: add sizes (sweep.width_ratios, sweep.depth_ratios) or "
            "sweep.seeds"
        )
    elif judged:
        lines.append(
            f"passed: {counted(len(judged), 'promise')} kept within {TOLERANCE:g}; only a sweep shows whether the LR "
            "transfers"
        )
    return lines


def _document(variant: Coordinates) -> dict[str, Any]:
    """What `mupsweep check coordinates --json` prints of a variant."""
    model, optimizer, parametrization = variant.label
    return {
        "model": model,
        "optimizer": optimizer,
        "parametrization": parametrization,
        "log2_lr": variant.log2_lr,
        "passed": None if variant.inconclusive and not variant.failed else variant.passed,
        "diverged": list(variant.diverged),
        "causes": variant.causes(),
        "roles": [_of_role(variant, row) for axis in variant.axes() for row in variant.by_role(axis)],
        "rows": [{**_row(row), "tensor": row.tensor or None, "off": row in variant.violations} for row in variant.rows],
    }


def _of_role(variant: Coordinates, row: Row) -> dict[str, Any]:
    """The record of a role, as in the tables.

    `off` lists the tensors that violate its expected exponent, `too_wide` says that its interval could not tell.
    """
    off = [violation.tensor for violation in variant.violations if _key(violation) == _key(row)]
    judged = {"judged": row.final_exponent.record(), "too_wide": row.too_wide}
    return {**_row(row), **judged, "shown": _is_shown(row), "off": off}


def _row(row: Row) -> dict[str, Any]:
    """The keys that the records of roles and tensors have in common."""
    return {
        "axis": row.axis,
        "quantity": row.quantity,
        "role": None if row.role is None else row.role.value,
        "promised": None if row.expected is None else str(row.expected),
        "sizes": list(row.sizes),
        "after": {
            str(count): {**exponent.record(), "values": list(row.values[count])}
            for count, exponent in row.exponents.items()
        },
    }


def _key(row: Row) -> tuple[str, str, Role | None]:
    """What the rows of all tensors of a role have in common."""
    return row.axis, row.quantity, row.role


def show_laws(config: SweepConfig, as_json: bool) -> bool:
    """Print the measured update law of every optimizer; returns whether all agree with the declared ones."""
    laws = [
        (optimizer, instantiate(variant.parametrization, "parametrization"), measured)
        for variant, optimizer, measured in update_law.laws(config)
    ]
    if as_json:
        print(json.dumps({"optimizers": [_law_document(*law) for law in laws]}))
    else:
        for optimizer, parametrization, measured in laws:
            _print_law(optimizer, parametrization, measured, config.overrides)
    return all(measured.passed for _, _, measured in laws)


def _print_law(
    optimizer: Optimizer, parametrization: Parametrization, measured: Measured, overrides: Sequence[str]
) -> None:
    console = console_of()
    console.print(f"\n{measured.name}: ||A||_2 = ||G||_2^degree n_out^x n_in^y ||W||^w at LR 1", style="bold")
    table = table_of("exponent", "rank 1", "95 % interval", "real grads", "95 % interval", "declared", "")
    for name, real in measured.realistic.by_name.items():
        rank_1 = measured.aligned.by_name.get(name)
        declared = measured.declared.get(name)
        cells = ["", ""] if rank_1 is None else _cells(rank_1)
        verdict = "" if declared is None else "off" if name in measured.violations else "ok"
        table.add_row(name, *cells, *_cells(real), "" if declared is None else signed(declared), verdict)
    console.show(table)
    conditions = list(measured.under)
    table = table_of("rank 1 after", *(f"{c.steps}, {'fresh' if c.fresh else 'repeated'}" for c in conditions), "")
    for name in measured.aligned.by_name:
        cells = [signed(measured.under[condition][name].value) for condition in conditions]
        table.add_row(name, *cells, "changes" if name in measured.changes else "ok")
    console.show(table)
    lines = [*_remarks(measured), f"weight decay: {measured.weight_decay}"]
    rule = _rule(optimizer, measured)
    if rule is not None:
        roles = ", ".join(f"{role} {lr}" for role, lr in _lrs(optimizer, parametrization, measured, rule).items())
        lines.append(f"LR under {parametrization.name}: {roles}")
    if not measured.declared:
        lines += _next_steps(measured, overrides)
    for line in lines:
        console.say(line)


def _cells(exponent: Exponent) -> tuple[str, str]:
    return signed(exponent.value), f"{signed(exponent.low)}..{signed(exponent.high)}"


def _remarks(measured: Measured) -> list[str]:
    """Lines on exponents that differ from the declared ones, and on why real gradients differ from those of rank 1."""
    lines = []
    for name in measured.violations:
        exponent, declared = measured.aligned.by_name[name], signed(measured.declared[name])
        lines.append(f"off: {name} is {exponent}, declared {declared}: its rule would be wrong")
    for name, conditions in measured.changes.items():
        ends = " and ".join(f"{signed(measured.under[c][name].value)} on {c}" for c in conditions)
        lines.append(f"changes: {name} is {ends}: no rule fits both")
    # exponents whose intervals do not overlap
    apart = {}
    for name, rank_1 in measured.aligned.by_name.items():
        real = measured.realistic.by_name[name]
        if real.low > rank_1.high or real.high < rank_1.low:
            apart[name] = rank_1.value, real.value
    if not apart:
        return lines
    differences = ", ".join(
        f"{name} {signed(real)} instead of {signed(rank_1)}" for name, (rank_1, real) in apart.items()
    )
    low, high = measured.realistic.stable_ranks
    smaller = sum(real - rank_1 for rank_1, real in apart.values()) < 0
    why = (
        "entries or blocks that are normalised one by one line up less there (Qiu et al. 2512.05620, section 3.2)"
        if smaller
        else "they turn from step to step, so that averages and bases of the steps before do not fit them"
    )
    return [*lines, f"real gradients differ: {differences}; updates have stable rank {low:.1f} to {high:.1f}; {why}"]


def _rule(optimizer: Optimizer, measured: Measured) -> UpdateLaw | None:
    """The law that runs use: the declared one, or else the measured one."""
    return optimizer.update_law() if measured.declared else measured.law()


def _lrs(
    optimizer: Optimizer, parametrization: Parametrization, measured: Measured, rule: UpdateLaw
) -> Mapping[str, str]:
    """The LR by role; of hidden matrices alone where the law holds for no others."""
    covered = [role for role in Role if measured.declared or measured.monomial or role is Role.HIDDEN]
    roles = [role for role in covered if role in optimizer.roles]
    return {role.value: str(symbolic(parametrization, rule, role).lr) for role in roles}


def _next_steps(measured: Measured, overrides: Sequence[str]) -> list[str]:
    """How to use a law that is not declared: the override for it, or why none follows."""
    keys = measured.keys()
    if measured.changes:
        return [
            "no law follows from exponents that change: take another optimizer, or give optimizer.law as it is for "
            "most of the training, and confirm it with mupsweep check"
        ]
    if keys is None:
        names = (
            tuple(measured.snapped) if measured.monomial else (update_law.DEGREE, update_law.BOTH, update_law.WEIGHT)
        )
        loose = [name for name in names if measured.snapped[name] is None] or [update_law.WEIGHT]
        return [
            f"no law follows: {', '.join(loose)} is no multiple of 1/{update_law.GRID}; give optimizer.law yourself"
        ]
    override = "optimizer.law={" + ", ".join(f"{k}: {v}" for k, v in keys.items()) + "}"
    lines = [f"use it: mupsweep run {shlex.join([*overrides, override])}"]
    if not measured.monomial:
        lines.append(
            "n_out and n_in have no exponent each, so this law holds only where both grow together: keep it to hidden "
            "matrices, optimizer.roles=[hidden] optimizer.rest=adamw"
        )
    return lines


def _law_document(optimizer: Optimizer, parametrization: Parametrization, measured: Measured) -> dict[str, Any]:
    rule = _rule(optimizer, measured)
    return {
        "optimizer": measured.name,
        "path": optimizer.path if isinstance(optimizer, Foreign) else None,
        "exponents": {
            name: {
                "rank_1": None if name not in measured.aligned.by_name else measured.aligned.by_name[name].record(),
                "real": real.record(),
                "declared": measured.declared.get(name),
                "snapped": None if measured.snapped.get(name) is None else str(measured.snapped[name]),
                "off": name in measured.violations,
                "under": [
                    {"fresh": condition.fresh, "steps": condition.steps, **exponents[name].record()}
                    for condition, exponents in measured.under.items()
                    if name in exponents
                ],
                "changes": name in measured.changes,
            }
            for name, real in measured.realistic.by_name.items()
        },
        "stable_rank": {
            "rank_1": list(measured.aligned.stable_ranks),
            "real": list(measured.realistic.stable_ranks),
        },
        "law": measured.keys(),
        "monomial": measured.monomial,
        "weight_decay": measured.weight_decay,
        "lr": None if rule is None else _lrs(optimizer, parametrization, measured, rule),
        "agrees": measured.passed,
    }
