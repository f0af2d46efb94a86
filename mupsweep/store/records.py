"""Records as they are read: somebody else may have written them, and a disk may have damaged them.

Each record is checked where it is read, so that names can be parts of paths and numbers can be computed with. The
functions here say what is wrong with a record; the readers decide what follows from that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from mupsweep.analysis.labels import DIVERGED, DONE, LARGEST_LOG2_LR
from mupsweep.errors import RecordError

PENDING, RUNNING, FAILED = "pending", "running", "failed"
STATES = (PENDING, RUNNING, FAILED, DONE, DIVERGED)
LARGEST_COUNT = 10**18  # of steps, tokens or parameters; also a limit for widths
LARGEST_NUMBER = 1e30
LARGEST_LOSS = 1e4  # nats per token; a run above it has lost its loss, which is recorded as diverged
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+@-]{0,127}")
NAME = re.compile(r"[^/\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]{1,200}")
JOB_ID = re.compile(r"[0-9]{1,18}")

Check = Callable[[Any], bool]


def is_run_id(value: Any) -> bool:
    """Whether a value can be the id of a run, which is the name of its folder: no slash, no leading dot."""
    return isinstance(value, str) and RUN_ID.fullmatch(value) is not None


def checked_run_id(value: Any, where: str = "a record") -> str:
    """A run id that may become part of a path.

    Raises:
        RecordError: it is no run id.
    """
    if not is_run_id(value):
        raise RecordError(f"{where} names the run {value!r:.80}: a run id has letters, digits and . + - _ @ only")
    return value


def is_name(value: Any) -> bool:
    """Whether a value is a name of one line, without slashes or control characters."""
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, and none that overflows in a product."""
    return type(value) in (int, float) and abs(value) <= LARGEST_NUMBER  # False for nan


def is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 on."""
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return is_number(value) and value > 0


def is_positive_count(value: Any) -> bool:
    """Whether a value is a whole number from 1 on."""
    return is_count(value) and value > 0


def is_seed(value: Any) -> bool:
    """Whether a value can be a seed."""
    return type(value) is int and abs(value) <= LARGEST_COUNT


def is_log2_lr(value: Any) -> bool:
    """Whether a value can be the log2 of an LR."""
    return is_number(value) and abs(value) <= LARGEST_LOG2_LR


def is_ratio(value: Any) -> bool:
    """Whether a value can be a size over the base's size."""
    return is_number(value) and 1e-9 <= value <= 1e9


def is_loss(value: Any) -> bool:
    """Whether a value can be a loss in nats per token."""
    return is_number(value) and 0 <= value <= LARGEST_LOSS


def is_float(value: Any) -> bool:
    """Whether a value is a number that a run may have come to, however large."""
    return type(value) is float or is_number(value)


def is_text(value: Any) -> bool:
    """Whether a value is text."""
    return isinstance(value, str)


def or_none(check: Check) -> Check:
    """`check`, or None."""
    return lambda value: value is None or check(value)


CHANGE: dict[str, Check] = {
    "hyperparameter": or_none(is_name),
    "value": or_none(is_number),
    "default": or_none(is_number),
}
SIZE: dict[str, Check] = {
    "width": is_positive_count,
    "depth": is_positive_count,
    "width_ratio": is_ratio,
    "depth_ratio": is_ratio,
    "log2_lr": is_log2_lr,
    "seed": is_seed,
}
PLACE: dict[str, Check] = {
    "run_id": is_run_id,
    "model": is_name,
    "parametrization": is_name,
    "optimizer": is_name,
    **SIZE,
}
PLANNED: dict[str, Check] = {**PLACE, "variant": is_name}
PLANNED_OPTIONS: dict[str, Check] = {
    **CHANGE,
    "parameters": is_positive_count,
    "tokens": is_positive_count,
    "flops": is_positive,
    "round": is_count,
    "reason": or_none(is_text),
    "validation": lambda value: isinstance(value, bool),
}
OUTCOME: dict[str, Check] = {
    "status": lambda value: value in (DONE, DIVERGED),
    "val_loss": or_none(is_loss),
}
OUTCOME_OPTIONS: dict[str, Check] = {
    "steps": or_none(is_count),
    "tokens": or_none(is_count),
    "train_loss": or_none(is_float),
    "val_bits_per_byte": or_none(is_number),
    "diverged_at_step": or_none(is_count),
    "horizon": or_none(is_positive_count),
}
SUMMARY: dict[str, Check] = {**PLACE, **OUTCOME}
SUMMARY_OPTIONS: dict[str, Check] = {
    **CHANGE,
    **OUTCOME_OPTIONS,
    "seconds": or_none(is_number),
    "tokens_per_second": or_none(is_number),
    "device": or_none(is_text),
    "flops": or_none(is_number),
    "precision": or_none(is_text),
    "micro_batch": or_none(is_positive_count),
    "branches": lambda value: isinstance(value, list) and all(wrong_in_branch(branch) is None for branch in value),
}
METRICS: dict[str, Check] = {"step": is_count}
METRICS_OPTIONS: dict[str, Check] = {
    "tokens": is_count,
    "train_loss": or_none(is_float),
    "val_loss": or_none(is_float),
    "lr": or_none(is_number),
}
STATUS_OPTIONS: dict[str, Check] = {
    "step": is_count,
    "steps": is_count,
    "train_loss": or_none(is_float),
    "tokens_per_second": or_none(is_number),
    "seconds": or_none(is_number),
    "error": is_text,
}


def wrong_in(record: Any, required: Mapping[str, Check], optional: Mapping[str, Check]) -> str | None:
    """What is wrong with a record: a key that it lacks, or a value that cannot be; None where nothing is."""
    if not isinstance(record, Mapping):
        return "it is no mapping"
    for key, check in required.items():
        if key not in record:
            return f"it has no {key}"
        if not check(record[key]):
            return f"{key}={record[key]!r:.80} cannot be"
    for key, check in optional.items():
        if key in record and not check(record[key]):
            return f"{key}={record[key]!r:.80} cannot be"
    return None


def wrong_in_planned(row: Any) -> str | None:
    """What is wrong with a line of plan.jsonl."""
    return wrong_in(row, PLANNED, PLANNED_OPTIONS) or _wrong_in_change(row)


def wrong_in_summary(summary: Mapping[str, Any], run_id: str) -> str | None:
    """What is wrong with the values that the summary.json of a run has."""
    if summary.get("run_id", run_id) != run_id:
        return f"it is that of {summary['run_id']!r:.80}"
    return wrong_in(summary, {}, {**SUMMARY, **SUMMARY_OPTIONS})


def missing_in_summary(summary: Mapping[str, Any]) -> str | None:
    """What a summary.json lacks of a result."""
    return wrong_in(summary, SUMMARY, {}) or _wrong_in_change(summary) or _wrong_in_outcome(summary)


def wrong_in_branch(branch: Any) -> str | None:
    """What is wrong with the outcome of a branch in a summary."""
    wrong = wrong_in(branch, {**OUTCOME, "horizon": is_positive_count}, OUTCOME_OPTIONS)
    return wrong or _wrong_in_outcome(branch)


def _wrong_in_outcome(record: Mapping[str, Any]) -> str | None:
    return "it is done and has no val_loss" if record["status"] == DONE and record["val_loss"] is None else None


def _wrong_in_change(record: Mapping[str, Any]) -> str | None:
    return "it has no value" if record.get("hyperparameter") and record.get("value") is None else None


def readable_status(content: Mapping[str, Any] | None) -> dict[str, Any]:
    """The status of a run in what its status.json holds; a run with a damaged one is pending."""
    if content is None or wrong_in(content, {"status": lambda value: value in STATES}, STATUS_OPTIONS) is not None:
        return {"status": PENDING}
    return dict(content)


def readable_job(content: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A recorded Slurm job; None for what is no such record, since its values become arguments of Slurm's commands."""
    if content is None or not isinstance(job := content.get("job"), str) or JOB_ID.fullmatch(job) is None:
        return None
    tasks = content.get("tasks")
    if not isinstance(tasks, list) or not all(isinstance(task, list) and all(map(is_run_id, task)) for task in tasks):
        return None
    return dict(content)


def is_failure(content: Mapping[str, Any]) -> bool:
    """Whether a record says why the processes of a run ended."""
    checks = {"reason": is_text, "micro_batch": or_none(is_positive_count), "final": lambda v: isinstance(v, bool)}
    return not wrong_in(content, checks, {})


def is_owner(content: Mapping[str, Any]) -> bool:
    """Whether the content of a claim file names an owner of a lease."""
    texts = ("host", "boot", "born", "slurm_cluster", "slurm_job", "slurm_restarts")
    pid = content.get("pid")
    return (
        type(pid) is int
        and 0 < pid < 2**31
        and all(isinstance(content.get(key), str | None) for key in texts)
        and (content.get("slurm_job") is None or re.fullmatch(r"[0-9_]{1,40}", content["slurm_job"]) is not None)
    )
