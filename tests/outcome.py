"""What a sweep came to, for tests that compare sweeps bit for bit."""

from __future__ import annotations

from mupsweep.store.sweep_dir import SweepDir

OF_THE_CLOCK = ("seconds", "tokens_per_second")  # all else in a summary is a result


def results(sweep: SweepDir) -> dict[str, tuple[dict[str, object], bytes]]:
    """What every run came to: its summary without the clock, and the bytes of its metrics."""
    found = {}
    for row in sweep.read_plan():
        run = sweep.run(row["run_id"])
        summary = run.summary()
        assert summary is not None, f"{run.run_id}: {run.status()}"
        found[run.run_id] = (
            {k: v for k, v in summary.items() if k not in OF_THE_CLOCK},
            run.metrics_path.read_bytes(),
        )
    return found
