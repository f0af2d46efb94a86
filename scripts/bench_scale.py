"""What a sweep of 100,000 runs costs beside training, for bench.py: `make bench`, or alone as this file.

plan, status, report   seconds and memory of the whole command; the finished runs are made up
claims                 64 processes that take 5,000 runs which train nothing: runs per second, and doubles
"""

from __future__ import annotations

import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from mupsweep.analysis.labels import DONE
from mupsweep.atomic_files import write_json
from mupsweep.store.sweep_dir import SweepDir

LRS, WIDTH_RATIOS, SEEDS = 200, (0.25, 0.5, 1, 2, 4), 100
CLAIMED, WORKERS = 5000, 64
NOISE = 0.003  # nats between seeds
SAVE = "import sys; from mupsweep.sweep import config, plan; plan.save(config.load(sys.argv[1:]), '')"


def scale(folder: Path) -> None:
    """Everything that depends on the number of runs."""
    lrs = ",".join(f"{-12 + i / 20:g}" for i in range(LRS))
    words = [f"sweep.log2_lrs=[{lrs}]", f"sweep.width_ratios={list(WIDTH_RATIOS)}".replace(" ", "")]
    words += [f"sweep.seeds={list(range(SEEDS))}".replace(" ", ""), f"out={folder}", "sweep.name=big"]
    sweep = SweepDir(folder / "big")
    cli = [sys.executable, "-m", "mupsweep"]
    print(f"\nscale: {LRS * len(WIDTH_RATIOS) * SEEDS:,} runs")
    show("mupsweep plan", [*cli, "plan", *words])
    show("plan and write the folder", [sys.executable, "-c", SAVE, *words])
    show("mupsweep status, none begun", [*cli, "status", str(sweep.path)])
    finish(sweep)
    show("mupsweep status, all finished", [*cli, "status", str(sweep.path)])
    show("mupsweep report", [*cli, "report", str(sweep.path)])
    contend(folder / "claimed")


def show(what: str, command: list[str]) -> None:
    """Wall seconds, processor seconds and the largest memory of a whole process that must succeed."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)[:200]} ended with exit code {process.returncode}")
    seconds, busy = time.perf_counter() - begin, usage.ru_utime + usage.ru_stime
    kilo = 1024 if sys.platform == "darwin" else 1
    print(
        f"  {what:<30} {seconds:>7.2f} s, {busy:>6.2f} s of a processor, {usage.ru_maxrss / kilo / 1024:>4.0f} MB",
        flush=True,
    )


def finish(sweep: SweepDir) -> None:
    """Make up the records of finished runs: a valley that moves with the width, and noise."""
    noise = random.Random(0)
    for row in sweep.read_plan():
        run = sweep.run(row["run_id"])
        run.path.mkdir(parents=True)
        loss = 3.0 + 0.01 * (row["log2_lr"] + 7.0) ** 2 + noise.gauss(0.0, NOISE)
        result = dict.fromkeys(("train_loss", "val_loss", "val_bits_per_byte"), loss)
        clock = {"seconds": 1.0, "tokens_per_second": 1.0, "device": "cpu", "devices": 1, "precision": "fp32"}
        settings = {key: row[key] for key in row if key not in ("variant", "parameters", "flops")}
        summary = {**settings, "status": DONE, "steps": 1000, **result, "diverged_at_step": None, **clock}
        write_json(run.summary_path, summary, durable=False)
        run.write_status(DONE, durable=False)


def contend(path: Path) -> None:
    """Many processes take runs from one folder, each walking through the plan as a worker does."""
    sweep = SweepDir(path)
    run_ids = [f"run-{i:05d}" for i in range(CLAIMED)]
    context = multiprocessing.get_context("fork")
    start, answers = context.Barrier(WORKERS + 1), context.SimpleQueue()
    processes = [context.Process(target=claim, args=(sweep, run_ids, start, answers)) for _ in range(WORKERS)]
    for process in processes:
        process.start()
    start.wait()
    begin = time.perf_counter()
    told = [answers.get() for _ in processes]
    seconds = time.perf_counter() - begin
    for process in processes:
        process.join()
    trained = Counter(run_id for taken, *_ in told for run_id in taken)
    looks = CLAIMED * WORKERS
    print(f"claims: {WORKERS} processes, {CLAIMED:,} runs that train nothing")
    print(f"  {len(trained) / seconds:,.0f} runs a second, {seconds:.1f} s in all")
    print(f"  a look at a run, taken or not, costs {1e6 * sum(t[2] for t in told) / looks:.0f} us of a processor")
    print(f"  the slowest claim took {max(t[1] for t in told):.3f} s")
    print(f"  taken by two: {sum(n > 1 for n in trained.values())}, by nobody: {CLAIMED - len(trained)}", flush=True)


def claim(sweep: SweepDir, run_ids: list[str], start: Any, answers: Any) -> None:
    """One process of `contend`; answers (runs taken, seconds of the slowest claim, of a processor)."""
    taken, slowest = [], 0.0
    start.wait()
    busy = time.process_time()
    for run in (sweep.run(run_id) for run_id in run_ids):
        if not run.is_open():
            continue
        begin = time.perf_counter()
        mine = run.claim()
        slowest = max(slowest, time.perf_counter() - begin)
        if mine is None:
            continue
        if run.is_open():
            write_json(run.summary_path, {}, durable=False)
            run.write_status(DONE, durable=False)
            taken.append(run.run_id)
        mine.release()
    answers.put((taken, slowest, time.process_time() - busy))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        scale(Path(temporary))
