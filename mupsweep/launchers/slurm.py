"""A Slurm cluster: job arrays that train bundles of runs, and a job after them that analyses the sweep.

Slurm is the scheduler. This module says which runs share a task and writes job scripts that a person can read and
submit again; `slurm_jobs` hands them to sbatch. The scripts call `mupsweep worker` and `mupsweep report`, so no process
of ours has to stay alive.
"""

from __future__ import annotations

import contextlib
import heapq
import math
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mupsweep.atomic_files import make_folder, write_text
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted, duration
from mupsweep.launchers import check_counts, sbatch, size_overrides, slurm_jobs
from mupsweep.store import slurm_queue
from mupsweep.store.lease import MAX_WORKER_DEATHS
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import GRID, from_tree

CORES_PER_GPU = 4  # one launches kernels, one runs the backward pass, the others compile; memory often comes by core
ANALYSIS = "report"  # the command of the job after the arrays
NEXT_ROUND = ("--next-round",)  # the option by which it goes on with a search
TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)", re.ASCII)


@dataclass(frozen=True)
class Site:
    """The paths that a job script needs.

    Attributes:
        sweep: name of the sweep.
        folder: the sweep's folder, absolute.
        logs: the folder that jobs print to, absolute.
        cwd: the folder that relative paths of the config start from.
        python: the interpreter that mupsweep is installed for.
        allow_imports: whether the person who submits allows the code outside mupsweep that the config names.
    """

    sweep: str
    folder: Path
    logs: Path
    cwd: Path
    python: str
    allow_imports: bool = False

    @classmethod
    def of(cls, sweep: SweepDir) -> Site:
        """Return the paths for a sweep as this process sees them."""
        folder, logs = sweep.path.resolve(), sweep.logs.resolve()
        return cls(sweep.name, folder, logs, Path.cwd(), sys.executable, bool(sweep.allow_imports))

    def mupsweep(self, command: str, *options: str) -> tuple[str, ...]:
        """Return the argv of a mupsweep command on the sweep."""
        consent = ["--allow-imports"] * self.allow_imports
        return self.python, "-m", "mupsweep", command, str(self.folder), *options, *consent


@dataclass(frozen=True)
class Slurm:
    """Job arrays on a Slurm cluster.

    Attributes:
        name: of the launcher.
        partition, account, qos, constraint, mem: sbatch's options of these names; None leaves them to the cluster.
        time: limit of a task, HH:MM:SS or D-HH:MM:SS; None leaves it to the cluster.
        gpus: GPUs per task and node; each has a worker of its own, or each group of `devices_per_run`.
        nodes: nodes per task; several train one run together.
        gres: sbatch's --gres, where gpu:N is not what the cluster wants.
        cpus: CPUs per task and node; None is one per thread of each worker, and at least CORES_PER_GPU for a GPU.
        workers: workers per task; None is one per GPU or group of GPUs, or one.
        devices_per_run: how many GPUs, or CPU processes, train a run together, each its share of every batch.
        shard: whether those devices divide the weights, gradients and optimizer state of the run.
        device: kind of torch device; None is cuda where there are GPUs, else cpu.
        threads: CPU threads per device's process.
        minutes_per_task: shorter runs are bundled until a task takes about so long.
        throttle: tasks of one array that may run at once.
        max_array: tasks per array; None asks the cluster.
        max_submitted: tasks and analysis jobs of the sweep that may be in the queue at once. When its tasks have ended,
            the analysis submits more of the rest. None is no limit.
        signal_seconds: how long before the time limit the workers are signalled to checkpoint.
        max_restarts: how often a task goes on in a new job after its time limit.
        modules: arguments of `module load`, in the job's login shell.
        setup: lines of shell code to run before the workers. Nothing else of a config is run by a shell.
        options: further options of sbatch for the arrays; a later option wins.
        analysis_options: further options of sbatch for the job that analyses.
        sizes: other values of these keys for some sizes, by the size's name.
    """

    name: str = "slurm"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = "04:00:00"
    mem: str | None = None
    gpus: int = 1
    nodes: int = 1
    gres: str | None = None
    cpus: int | None = None
    workers: int | None = None
    devices_per_run: int = 1
    shard: bool = False
    device: str | None = None
    threads: int = 1
    minutes_per_task: float = 30.0
    throttle: int | None = None
    max_array: int | None = None
    max_submitted: int | None = None
    signal_seconds: int = 120
    max_restarts: int = 100
    modules: tuple[str, ...] = ()
    setup: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    analysis_options: tuple[str, ...] = ()
    sizes: Any = None

    def __post_init__(self) -> None:
        check_counts(self, "cpus", "nodes", "workers", "devices_per_run", "threads", "throttle", "max_array")
        check_counts(self, "signal_seconds")
        check_counts(self, "gpus", "max_restarts", least=0)
        check_counts(self, "max_submitted", least=3)  # the analysis that submits, a task, and the analysis after it
        if self.minutes_per_task <= 0:
            raise ConfigError(f"launcher.minutes_per_task={self.minutes_per_task:g}: expected more than 0")
        for key in ("partition", "account", "qos", "constraint", "mem", "gres", "device"):
            if (value := getattr(self, key)) is not None:
                sbatch.checked_value(value, f"launcher.{key}")
        for key in ("options", "analysis_options"):
            for option in getattr(self, key):
                sbatch.checked_option(option, f"launcher.{key}")
        for module in self.modules:
            sbatch.checked_value(module, "launcher.modules")
        for line in self.setup:
            sbatch.checked_line(line, "launcher.setup")
        self._check_time()
        if self.shard and self.devices_per_run == 1:
            raise ConfigError("launcher.shard=true: expected launcher.devices_per_run to be at least 2")
        if self.gpus == 0 and self.kind_of_device == "cuda":
            raise ConfigError("launcher.device=cuda: expected launcher.gpus to be at least 1")
        self._check_devices()
        size_overrides.check(self)

    def _check_devices(self) -> None:
        """Refuse devices per run that the GPUs and nodes of a task do not give."""
        width, where = self.devices_per_run, f"launcher.devices_per_run={self.devices_per_run}"
        if self.nodes == 1:
            if self.kind_of_device == "cuda" and self.gpus % width:
                raise ConfigError(f"{where}: expected a divisor of launcher.gpus={self.gpus}")
            return
        if self.workers not in (None, 1):
            raise ConfigError(f"launcher.workers={self.workers}: launcher.nodes={self.nodes} train one run at a time")
        if self.kind_of_device == "cuda" and width != self.nodes * self.gpus:
            raise ConfigError(
                f"{where}: expected all GPUs of the nodes, launcher.nodes * launcher.gpus = {self.nodes * self.gpus}"
            )
        if width % self.nodes:
            raise ConfigError(f"{where}: expected a multiple of launcher.nodes={self.nodes}")

    def _check_time(self) -> None:
        """Refuse a time limit of another format, or too short for a checkpoint."""
        if self.time is None:
            return
        match = TIME.fullmatch(self.time)
        if match is None:
            raise ConfigError(
                f"launcher.time={self.time}: expected HH:MM:SS or D-HH:MM:SS, in quotes in a yaml file, or null"
            )
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        if ((days * 24 + hours) * 60 + minutes) * 60 + seconds <= self.signal_seconds:
            raise ConfigError(
                f"launcher.time={self.time}: expected more than launcher.signal_seconds={self.signal_seconds}, "
                "the time to write a checkpoint"
            )

    @property
    def kind_of_device(self) -> str:
        """The kind of torch device that runs are trained on."""
        return self.device or ("cuda" if self.gpus else "cpu")

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of every worker of a task, or its devices separated by commas; with several nodes, of one node."""
        kind, width = self.kind_of_device, self.devices_per_run // self.nodes
        count = self.workers or max(1, self.gpus // width)
        names = [f"{kind}:{i % self.gpus}" if kind == "cuda" else kind for i in range(count * width)]
        return tuple(",".join(names[i : i + width]) for i in range(0, len(names), width))

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        """Submit the runs that no queued or running job has, and the analysis after them; wait for neither.

        Raises:
            ConfigError: Slurm refuses a job; those that it has taken stay, with an analysis.
        """
        with sweep.lock():
            recorded = sweep.read_jobs()
            queue = slurm_queue.of_sweep(recorded)
            if slurm_jobs.was_cancelled(recorded, queue):
                _print("this job was cancelled: it submits nothing")
                return False
            missing = [run_id for run_id in run_ids if run_id not in queue.runs]
            if unfinished := len(slurm_queue.submitted_runs(recorded).intersection(missing)):
                _print(f"jobs ended without finishing {counted(unfinished, 'run')}; what they said is in {sweep.logs}")
            if queued := len(run_ids) - len(missing):
                _print(f"{counted(queued, 'run')} in queued or running jobs")
            arrays = list(queue.arrays)
            try:
                waiting = self._submit_arrays(sweep, missing, self._room(queue), arrays)
            except ConfigError:
                if arrays:
                    with contextlib.suppress(ConfigError):  # the queue may be full for this job too
                        self._submit_analysis(sweep, arrays)
                raise
            if waiting:
                n_runs = counted(len(waiting), "run")
                _print(f"launcher.max_submitted={self.max_submitted}: {n_runs} left for the analysis to submit")
            if missing or not queue.analysis:
                # Where analyses have filled the queue, the new one follows them.
                self._submit_analysis(sweep, arrays or [job.job_id for job in queue.analysis], goes_on=bool(waiting))
        folder = shlex.quote(str(sweep.path))
        _print(f"follow with: mupsweep status {folder}   stop with: mupsweep cancel {folder}")
        return True

    def _room(self, queue: slurm_queue.Queue) -> int | None:
        """Return how many tasks may be submitted beside those in the queue; None is no limit."""
        if self.max_submitted is None:
            return None
        tasks = {job.job_id for job in queue.runs.values()}
        return max(0, self.max_submitted - len(tasks) - len(queue.analysis) - 1)

    def _submit_arrays(self, sweep: SweepDir, run_ids: Sequence[str], room: int | None, arrays: list[str]) -> list[str]:
        """Submit the arrays of some runs, adding their ids to `arrays`; return the runs for which there is no room."""
        waiting = set(run_ids)
        for script, tasks in self.write_arrays(sweep, run_ids, room):
            arrays.append(slurm_jobs.submit(sweep, script, [task.run_ids for task in tasks]))
            waiting.difference_update(run_id for task in tasks for run_id in task.run_ids)
            n_runs, longest = sum(len(task.run_ids) for task in tasks), max(task.seconds for task in tasks)
            about = f"{counted(n_runs, 'run')} in {counted(len(tasks), 'task')} of roughly {duration(longest)}"
            _print(f"submitted job {arrays[-1]}: {about} ({script})")
        return [run_id for run_id in run_ids if run_id in waiting]

    def _submit_analysis(self, sweep: SweepDir, jobs: Sequence[str], goes_on: bool = False) -> None:
        """Submit the analysis after some jobs.

        Args:
            goes_on: whether it has runs left to submit.
        """
        script = self.write_analysis(sweep, goes_on)
        after = slurm_jobs.submit(sweep, script, [], f"--dependency=afterany:{':'.join(jobs)}")
        _print(f"submitted job {after}: the analysis when these have ended ({script})")

    def preview(self, sweep: SweepDir, run_ids: Sequence[str]) -> None:
        """Write and print the scripts of these runs, and submit nothing."""
        for script in [*(script for script, _ in self.write_arrays(sweep, run_ids)), self.write_analysis(sweep)]:
            print(f"==> {script} <==\n{script.read_bytes().decode()}")

    def write_arrays(
        self, sweep: SweepDir, run_ids: Sequence[str], room: int | None = None
    ) -> Iterator[tuple[Path, list[sbatch.Task]]]:
        """Write the scripts of every size, the largest first, each an array that the cluster takes; yield its tasks.

        Args:
            room: the most tasks of all arrays together; None is no limit.
        """
        requested = set(run_ids)
        by_size = sorted(
            (run for run in plan.load(sweep) if run.run_id in requested), key=lambda run: run.size, reverse=True
        )
        limit = self.max_array or slurm_jobs.max_array_size()
        for size, group in groupby(by_size, key=lambda run: run.size.name):
            runs = list(group)
            program = runs[0].resolved.trainer.runs_program
            launcher = size_overrides.for_size(self, size)
            kind = "cuda" if launcher.kind_of_device == "cuda" else "cpu"
            lengths = {
                run.run_id: run.cost.seconds(run.resolved.steps, kind) / launcher.devices_per_run for run in runs
            }
            target = 60 * launcher.minutes_per_task
            if not all(run.cost.known for run in runs):  # nobody knows how long a program takes: each run is a task
                lengths = dict.fromkeys(lengths, target)
            tasks = bundled(lengths, len(launcher.devices), target)
            if room is not None:
                tasks = tasks[:room]
                room -= len(tasks)
            for start in range(0, len(tasks), limit):
                name = size if start == 0 else f"{size}-{start // limit + 1}"
                piece = tasks[start : start + limit]
                yield _write(sweep, name, launcher.array_text(Site.of(sweep), name, piece, program)), piece

    def write_analysis(self, sweep: SweepDir, goes_on: bool = False) -> Path:
        """Write the script of the job after the arrays.

        Args:
            goes_on: whether it has runs left to submit, as in a search it always may.
        """
        goes_on = goes_on or from_tree(sweep.read_config(), to_read=True).sweep.search != GRID
        return _write(sweep, ANALYSIS, self.analysis_text(Site.of(sweep), goes_on))

    def array_text(self, site: Site, name: str, tasks: Sequence[sbatch.Task], program: bool = False) -> str:
        """Return the script of a job array; its text depends on the arguments alone.

        Args:
            program: whether a program of the user's trains, which starts its processes on all nodes itself.
        """
        throttle = f"%{self.throttle}" if self.throttle else ""
        devices_per_node = self.devices_per_run // self.nodes
        # On several nodes Slurm starts every process of ours; on one, rank 0 starts the others itself.
        spread = self.nodes > 1 and not program
        processes = devices_per_node if spread else 1
        per_device = max(self.threads, CORES_PER_GPU) if self.kind_of_device == "cuda" else self.threads
        cpus = max(1, (self.cpus or per_device * len(self.devices) * devices_per_node) // processes)
        resources = {
            "nodes": self.nodes if self.nodes > 1 else None,
            "ntasks-per-node": processes if self.nodes > 1 else None,
            "cpus-per-task": cpus,
            "gres": self.gres or (f"gpu:{self.gpus}" if self.gpus else None),
            "mem": self.mem,
            "time": self.time,
        }
        options = [
            *self._shared_options(site, name, "%x-%A_%a.out"),
            *(["--ntasks=1"] if self.nodes == 1 else []),
            f"--array=0-{len(tasks) - 1}{throttle}",
            "--requeue",
            f"--signal=B:USR1@{self.signal_seconds}",
            *(f"--{key}={value}" for key, value in resources.items() if value is not None),
            *self.options,
        ]
        comment = [
            "Trains runs of one size. To submit all or some of its tasks again: sbatch [--array=3,7] THIS_FILE",
            "What is finished is skipped.",
        ]
        header = sbatch.header(comment, options, login=bool(self.modules))
        options = self._worker_options(spread)
        return sbatch.array_script(header, self._preamble(), tasks, site.mupsweep("worker"), options)

    def _worker_options(self, spread: bool) -> list[str]:
        """Return the options of `mupsweep worker` in a task.

        Args:
            spread: whether Slurm starts a process on every device of every node.
        """
        options = [word for device in self.devices for word in ("--device", device)]
        options += ["--threads", str(self.threads), *["--shard"] * self.shard]
        if spread:
            options += ["--nodes", str(self.nodes)]
        # One worker more than a run may cost: it trains the other runs before the deadly one.
        return [*options, "--restarts", str(MAX_WORKER_DEATHS), "--requeue", str(self.max_restarts)]

    def analysis_text(self, site: Site, goes_on: bool = False) -> str:
        """Return the script of the job after the arrays; its text depends on the arguments alone.

        Args:
            goes_on: whether the job submits more arrays, and itself after them.
        """
        options = [*self._shared_options(site, ANALYSIS, "%x-%j.out"), "--ntasks=1", *self.analysis_options]
        comment = ["Analyses the sweep as it is; submitted to start after the arrays with --dependency=afterany:JOBS"]
        header = sbatch.header(comment, options, login=bool(self.modules))
        return sbatch.analysis_script(header, self._preamble(), site.mupsweep("report", *NEXT_ROUND * goes_on))

    def _shared_options(self, site: Site, name: str, log: str) -> Iterator[str]:
        """Yield the options that arrays and the analysis have in common."""
        yield f"--job-name={re.sub('[^A-Za-z0-9_.-]', '_', site.sweep)}-{name}"
        yield f"--output={sbatch.file_pattern(site.logs, log)}"
        yield "--open-mode=append"
        yield f"--chdir={site.cwd}"
        for key in ("partition", "account", "qos", "constraint"):
            if getattr(self, key) is not None:
                yield f"--{key}={getattr(self, key)}"

    def _preamble(self) -> list[str]:
        """Return the shell lines that prepare the job's environment."""
        return [*(f"module load {shlex.quote(module)}" for module in self.modules), *self.setup]


def bundled(lengths: Mapping[str, float], workers: int, target: float) -> list[sbatch.Task]:
    """Bundle runs into tasks of about equal length: as few as the target allows, or one per worker for longer runs.

    Args:
        lengths: seconds that each run takes on one worker.
        workers: how many workers share the runs of a task.
        target: seconds that a task may take.
    """
    count = min(math.ceil(len(lengths) / workers), math.ceil(sum(lengths.values()) / (target * workers)))
    bundles: list[tuple[float, int, list[str]]] = [(0.0, i, []) for i in range(count)]
    for run_id, seconds in sorted(lengths.items(), key=lambda item: (-item[1], item[0])):
        total, i, members = bundles[0]  # the longest remaining run goes into the shortest bundle
        heapq.heapreplace(bundles, (total + seconds, i, [*members, run_id]))
    bundles.sort(key=lambda bundle: bundle[1])
    return [
        sbatch.Task(tuple(members), max(total / workers, *(lengths[run_id] for run_id in members)))
        for total, _, members in bundles
    ]


def _write(sweep: SweepDir, name: str, text: str) -> Path:
    """Write a job script of a sweep and return its path."""
    make_folder(sweep.logs)  # Slurm makes no folder for a job's output
    write_text(sweep.script(name), text)
    return sweep.script(name)


def _print(line: str) -> None:
    """Print a line for the user to stderr."""
    print(line, file=sys.stderr)
