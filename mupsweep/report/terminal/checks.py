"""What the check commands print: tables of exponents for people, JSON for scripts."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mupsweep.atomic_files import make_folder, write_json
from mupsweep.check import update_law
from mupsweep.check.exponents import TOLERANCE, WEIGHT, Coordinates, Row, kind_of_blocks
from mupsweep.check.measure import CHANGE, UPDATE
from mupsweep.check.regression import Exponent, signed
from mupsweep.check.update_law import Measured
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
    """The exponents of every variant, SP's beside them; whether all promises are kept."""
    if figure is not None:
        from mupsweep.report.figures.coordinates import check

        check(Path(figure))  # before anything is trained, which `checked` does as it goes
    found = list(checked)
    document = {"variants": [_document(one) for one in found]}
    if into is not None:
        make_folder(into.results)
        write_json(into.check_path, document)
    if figure is not None:
        from mupsweep.report.figures.coordinates import draw

        draw(found, Path(figure))
    if as_json:
        print(json.dumps(document))
        return all(one.passed for one in found)
    console = console_of()
    beside = {one.label[:2]: one for one in found if one.label[2] == SP}
    for one in [one for one in found if one.label[2] != SP] or found:
        console.print(f"\n{'/'.join(one.label)}, base LR 2^{one.log2_lr:g}", style="bold")
        sp = beside.get(one.label[:2])
        for axis in one.axes():
            console.show(_coordinates_table(one, None if sp is one else sp, axis))
        for line in _conclusion(one):
            console.say(line)
    if into is not None:
        console.print(f"wrote {into.check_path}; mupsweep report {into.path} shows it")
    return all(one.passed for one in found)


def _coordinates_table(one: Coordinates, sp: Coordinates | None, axis: str) -> Table:
    rows = [row for row in one.by_role(axis) if _is_shown(row)]
    counts = sorted({count for row in rows for count in row.exponents if (row.quantity == WEIGHT) == (count == 0)})
    steps = [f"after {count}" if count else "start" for count in counts]
    table = table_of(f"exponent of the {axis}", *steps, "95 % interval", "promise", *(["sp"] if sp else []), "")
    beside = {(row.quantity, row.role): signed(row.final_exponent.value) for row in sp.by_role(axis)} if sp else {}
    for row in rows:
        mine = {c: e for c, e in row.exponents.items() if (row.quantity == WEIGHT) == (c == 0)}
        cells = [signed(mine[c].value) if c in mine else "" for c in counts]
        theirs = [beside.get((row.quantity, row.role), "")] if sp else []
        off = [r for r in one.violations if _key(r) == _key(row)]
        table.add_row(
            row.quantity if row.role is None else f"{row.quantity} {row.role.value}",
            *cells,
            f"{signed(row.final_exponent.low)}..{signed(row.final_exponent.high)}",  # in 80 columns
            "" if row.expected is None else str(row.expected),
            *theirs,
            "" if row.expected is None else f"off {off[0].tensor}".strip() if off else "ok",
        )
    return table


def _is_shown(row: Row) -> bool:
    """Changes, updates and starts."""
    return row.quantity in (UPDATE, WEIGHT) or row.quantity.startswith(CHANGE)


def _conclusion(one: Coordinates) -> list[str]:
    lines = [line] if (line := kind_of_blocks(one)) else []
    judged = [row for axis in one.axes() for row in one.by_role(axis) if row.expected is not None]
    missed = {(row.axis, row.quantity, row.role) for row in one.violations}
    for axis in one.axes():
        if not one.has_expectation(axis):
            lines.append(f"{one.label[2]} promises nothing along the {axis}")
    lines += one.causes()
    if not one.passed:
        told = f"{len(missed)} of {len(judged)} promises are missed by more than {TOLERANCE:g}"
        return [*lines, f"FAILED: {told if missed else 'what diverged keeps no promise'}"]
    if judged:
        lines.append(
            f"passed: {len(judged)} promises kept within {TOLERANCE:g}; whether the LR transfers, a sweep tells"
        )
    return lines


def _document(one: Coordinates) -> dict[str, Any]:
    model, optimizer, parametrization = one.label
    return {
        "model": model,
        "optimizer": optimizer,
        "parametrization": parametrization,
        "log2_lr": one.log2_lr,
        "passed": one.passed,
        "diverged": list(one.diverged),
        "causes": one.causes(),
        "roles": [_of_role(one, row) for axis in one.axes() for row in one.by_role(axis)],
        "rows": [{**_row(row), "tensor": row.tensor or None, "off": row in one.violations} for row in one.rows],
    }


def _of_role(one: Coordinates, row: Row) -> dict[str, Any]:
    """The tensors of a role as one, as tables show it; off are those that break its promise."""
    off = [broken.tensor for broken in one.violations if _key(broken) == _key(row)]
    return {**_row(row), "judged": _interval(row.final_exponent), "shown": _is_shown(row), "off": off}


def _row(row: Row) -> dict[str, Any]:
    return {
        "axis": row.axis,
        "quantity": row.quantity,
        "role": None if row.role is None else row.role.value,
        "promised": None if row.expected is None else str(row.expected),
        "sizes": list(row.sizes),
        "after": {
            str(count): {**_interval(exponent), "values": list(row.values[count])}
            for count, exponent in row.exponents.items()
        },
    }


def _key(row: Row) -> tuple[str, str, Role | None]:
    return row.axis, row.quantity, row.role


def _interval(exponent: Exponent) -> dict[str, float]:
    return {"value": exponent.value, "low": exponent.low, "high": exponent.high}


def show_laws(chosen: SweepConfig, as_json: bool) -> bool:
    """The measured law of every optimizer, and what follows from it; whether all agree with what they declare."""
    measured = [
        (optimizer, instantiate(variant.parametrization, "parametrization"), found)
        for variant, optimizer, found in update_law.laws(chosen)
    ]
    if as_json:
        documents = [_law_document(optimizer, rule, found) for optimizer, rule, found in measured]
        print(json.dumps({"optimizers": documents}))
    else:
        for optimizer, parametrization, found in measured:
            _print_law(optimizer, parametrization, found, chosen.overrides)
    return not any(found.violations for _, _, found in measured)


def _print_law(
    optimizer: Optimizer, parametrization: Parametrization, found: Measured, overrides: Sequence[str]
) -> None:
    console = console_of()
    console.print(f"\n{found.name}: ||A||_2 = ||G||_2^degree n_out^x n_in^y ||W||^w at LR 1", style="bold")
    table = table_of("exponent", "rank 1", "95 % interval", "real grads", "95 % interval", "declared", "")
    for name, real in found.realistic.found.items():
        rank_1 = found.aligned.found.get(name)
        said = found.declared.get(name)
        cells = ["", ""] if rank_1 is None else _cells(rank_1)
        verdict = "" if said is None else "off" if name in found.violations else "ok"
        table.add_row(name, *cells, *_cells(real), "" if said is None else signed(said), verdict)
    console.show(table)
    lines = [*_remarks(found), f"weight decay: {found.weight_decay}"]
    rule = _rule(optimizer, found)
    if rule is not None:
        roles = ", ".join(f"{role} {lr}" for role, lr in _lrs(optimizer, parametrization, found, rule).items())
        lines.append(f"LR under {parametrization.name}: {roles}")
    if not found.declared:
        lines += _next_steps(found, overrides)
    for line in lines:
        console.say(line)


def _cells(exponent: Exponent) -> tuple[str, str]:
    return signed(exponent.value), f"{signed(exponent.low)}..{signed(exponent.high)}"


def _remarks(found: Measured) -> list[str]:
    """What is off, and why real gradients may say otherwise than those of rank 1."""
    lines = [
        f"off: {name} is {found.aligned.found[name]}, declared {signed(found.declared[name])}: its rule would be wrong"
        for name in found.violations
    ]
    apart = {
        name: (mine.value, real.value)
        for name, mine in found.aligned.found.items()
        if (real := found.realistic.found[name]).low > mine.high or real.high < mine.low
    }
    if not apart:
        return lines
    told = ", ".join(f"{name} {signed(real)} instead of {signed(mine)}" for name, (mine, real) in apart.items())
    low, high = found.realistic.stable_ranks
    smaller = sum(real - mine for mine, real in apart.values()) < 0
    why = (
        "entries or blocks that are normalised one by one line up less there (Qiu et al. 2512.05620, section 3.2)"
        if smaller
        else "they turn from step to step, so that averages and bases of the steps before do not fit them"
    )
    return [*lines, f"real gradients differ: {told}; updates have stable rank {low:.1f} to {high:.1f}; {why}"]


def _rule(optimizer: Optimizer, found: Measured) -> UpdateLaw | None:
    """The law that runs use: the declared one, or the one that was measured."""
    return optimizer.update_law() if found.declared else found.law()


def _lrs(optimizer: Optimizer, parametrization: Parametrization, found: Measured, rule: UpdateLaw) -> Mapping[str, str]:
    """By role; of hidden matrices alone where the law holds for no others."""
    known = [role for role in Role if found.declared or found.monomial or role is Role.HIDDEN]
    roles = [role for role in known if role in optimizer.roles]
    return {role.value: str(symbolic(parametrization, rule, role).lr) for role in roles}


def _next_steps(found: Measured, overrides: Sequence[str]) -> list[str]:
    """How to use a law that nobody declared, as an override."""
    keys = found.keys()
    if keys is None:
        known = (update_law.DEGREE, update_law.BOTH, update_law.WEIGHT) if not found.monomial else tuple(found.snapped)
        loose = [name for name in known if found.snapped[name] is None] or [update_law.WEIGHT]
        return [
            f"no law follows: {', '.join(loose)} is no multiple of 1/{update_law.GRID}; give optimizer.law yourself"
        ]
    word = "optimizer.law={" + ", ".join(f"{k}: {v}" for k, v in keys.items()) + "}"
    lines = [f"use it: mupsweep run {shlex.join([*overrides, word])}"]
    if not found.monomial:
        lines.append(
            "n_out and n_in have no exponent each, so this law holds only where both grow together: keep it to hidden "
            "matrices, optimizer.roles=[hidden] optimizer.rest=adamw"
        )
    return lines


def _law_document(optimizer: Optimizer, parametrization: Parametrization, found: Measured) -> dict[str, Any]:
    rule = _rule(optimizer, found)
    return {
        "optimizer": found.name,
        "path": optimizer.path if isinstance(optimizer, Foreign) else None,
        "exponents": {
            name: {
                "rank_1": None if name not in found.aligned.found else _interval(found.aligned.found[name]),
                "real": _interval(real),
                "declared": found.declared.get(name),
                "snapped": None if found.snapped.get(name) is None else str(found.snapped[name]),
                "off": name in found.violations,
            }
            for name, real in found.realistic.found.items()
        },
        "stable_rank": {
            "rank_1": list(found.aligned.stable_ranks),
            "real": list(found.realistic.stable_ranks),
        },
        "law": found.keys(),
        "monomial": found.monomial,
        "weight_decay": found.weight_decay,
        "lr": None if rule is None else _lrs(optimizer, parametrization, found, rule),
        "agrees": not found.violations,
    }
