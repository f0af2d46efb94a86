"""A Slurm cluster: job arrays that train bundles of runs, and a job after them that analyses the sweep.

Slurm is the scheduler. This module writes job scripts that a person can read and submit again, hands them to sbatch and
remembers the job ids; the scripts call `mupsweep worker` and `mupsweep report`, so nothing here needs to stay alive.
"""

from __future__ import annotations

import heapq
import math
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from mupsweep.atomic_files import make_folder, write_text
from mupsweep.errors import ConfigError
from mupsweep.formatting import counted, duration
from mupsweep.launchers import check_counts, sbatch, size_overrides
from mupsweep.store import slurm_queue
from mupsweep.store.run_dir import RUNNING
from mupsweep.store.sweep_dir import SweepDir
from mupsweep.sweep import plan
from mupsweep.sweep.config import GRID, from_tree
from mupsweep.training.signals import defer_signals

SECONDS = 120.0  # how long one call of Slurm's commands may take
ANALYSIS = "report"
NEXT = ("--next-round",)  # what makes that command go on with a search
DEFAULT_MAX_ARRAY = 1001  # MaxArraySize where Slurm's administrator chose none
TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d):([0-5]\d)", re.ASCII)


@dataclass(frozen=True)
class Site:
    """What a job script has to know of the place it is written at.

    Attributes:
        sweep: its name.
        folder: of the sweep, absolute.
        logs: where jobs print to, absolute.
        cwd: the folder that relative paths of the config start from.
        python: the interpreter that mupsweep is installed for.
    """

    sweep: str
    folder: Path
    logs: Path
    cwd: Path
    python: str

    @classmethod
    def of(cls, sweep: SweepDir) -> Site:
        """This process's place."""
        return cls(sweep.name, sweep.path.resolve(), sweep.logs.resolve(), Path.cwd(), sys.executable)

    def mupsweep(self, command: str, *options: str) -> tuple[str, ...]:
        """The words of a command on the sweep."""
        return self.python, "-m", "mupsweep", command, str(self.folder), *options


@dataclass(frozen=True)
class Slurm:
    """Job arrays on a Slurm cluster.

    Attributes:
        partition, account, qos, constraint, mem: sbatch's options of these names; None leaves them to the cluster.
        time: limit of a task, HH:MM:SS or D-HH:MM:SS; None leaves it to the cluster.
        gpus: per task and node; each gets a worker of its own, or each group of `devices_per_run`.
        nodes: per task; several train one run together.
        gres: sbatch's --gres, where gpu:N is not what the cluster wants.
        cpus: per task and node; None is one per thread of each worker.
        workers: per task; None is one per GPU or group of GPUs, or one.
        devices_per_run: how many GPUs, or CPU processes, train a run together, each its share of every batch.
        shard: divide the weights, gradients and optimizer state of a run among its devices.
        device: kind of torch device; None is cuda where there are GPUs, else cpu.
        threads: CPU threads per device's process.
        minutes_per_task: shorter runs are bundled until a task takes about so long.
        throttle: tasks of one array that may run at once.
        max_array: tasks per array; None asks the cluster.
        signal_seconds: how long before the time limit the workers are told to checkpoint.
        max_restarts: how often a task goes on in a new job after its time limit.
        modules: arguments of `module load`, in the job's login shell.
        setup: lines of shell code to run before the workers. Nothing else of a config is run by a shell.
        options: further options of sbatch for the arrays; a later option wins.
        analysis_options: the same for the job that analyses.
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
        return self.device or ("cuda" if self.gpus else "cpu")

    @property
    def devices(self) -> tuple[str, ...]:
        """The device of every worker of a task, or its devices separated by commas; of a node where there are more."""
        kind, width = self.kind_of_device, self.devices_per_run // self.nodes
        count = self.workers or max(1, self.gpus // width)
        names = [f"{kind}:{i % self.gpus}" if kind == "cuda" else kind for i in range(count * width)]
        return tuple(",".join(names[i : i + width]) for i in range(0, len(names), width))

    def launch(self, sweep: SweepDir, run_ids: Sequence[str]) -> bool:
        """Submit the runs that are in no queued or running job, and the analysis after them; wait for neither."""
        with sweep.lock() as lock:
            recorded = sweep.read_jobs()
            queue = slurm_queue.of_sweep(recorded)
            if was_cancelled(recorded, queue):
                _tell("this job was cancelled: it submits nothing")
                return False
            missing = [run_id for run_id in run_ids if run_id not in queue.runs]
            submitted = {run_id for row in recorded for task in row["tasks"] for run_id in task}
            if left := len(submitted.intersection(missing)):
                _tell(f"jobs ended without finishing {counted(left, 'run')}; what they said is in {sweep.logs}")
            if kept := len(run_ids) - len(missing):
                _tell(f"{counted(kept, 'run')} in queued or running jobs")
            arrays = list(queue.arrays)
            for script, tasks in self.write_arrays(sweep, missing):
                lock.heartbeat()  # a busy controller takes minutes for a job
                arrays.append(submit(sweep, script, [task.run_ids for task in tasks]))
                n_runs, longest = sum(len(task.run_ids) for task in tasks), max(task.seconds for task in tasks)
                about = f"{counted(n_runs, 'run')} in {counted(len(tasks), 'task')} of roughly {duration(longest)}"
                _tell(f"submitted job {arrays[-1]}: {about} ({script})")
            if missing or not queue.analysis:
                script = self.write_analysis(sweep)
                after = submit(sweep, script, [], f"--dependency=afterany:{':'.join(arrays)}")
                _tell(f"submitted job {after}: the analysis when these have ended ({script})")
        _tell(f"follow with: mupsweep status {sweep.path}   stop with: mupsweep cancel {sweep.path}")
        return True

    def preview(self, sweep: SweepDir, run_ids: Sequence[str]) -> None:
        """Write and print the scripts for these runs, and submit nothing."""
        for script in [*(script for script, _ in self.write_arrays(sweep, run_ids)), self.write_analysis(sweep)]:
            print(f"==> {script} <==\n{script.read_bytes().decode()}")

    def write_arrays(self, sweep: SweepDir, run_ids: Sequence[str]) -> Iterator[tuple[Path, list[sbatch.Task]]]:
        """A script and its tasks for every size, the largest first, in pieces that the cluster takes as one array."""
        wanted = set(run_ids)
        chosen = sorted(
            (run for run in plan.load(sweep) if run.run_id in wanted), key=lambda run: run.size, reverse=True
        )
        limit = self.max_array or max_array_size()
        for size, runs in groupby(chosen, key=lambda run: run.size.name):
            mine = size_overrides.for_size(self, size)
            kind = "cuda" if mine.kind_of_device == "cuda" else "cpu"
            lengths = {run.run_id: run.cost.seconds(run.resolved.steps, kind) / mine.devices_per_run for run in runs}
            tasks = bundled(lengths, len(mine.devices), 60 * mine.minutes_per_task)
            for start in range(0, len(tasks), limit):
                name = size if start == 0 else f"{size}-{start // limit + 1}"
                piece = tasks[start : start + limit]
                yield _write(sweep, name, mine.array_text(Site.of(sweep), name, piece)), piece

    def write_analysis(self, sweep: SweepDir) -> Path:
        """The script of the job after the arrays."""
        searches = from_tree(sweep.read_config()).sweep.search != GRID
        return _write(sweep, ANALYSIS, self.analysis_text(Site.of(sweep), searches))

    def array_text(self, site: Site, name: str, tasks: Sequence[sbatch.Task]) -> str:
        """The script of a job array, from nothing but its arguments."""
        throttle = f"%{self.throttle}" if self.throttle else ""
        share = self.devices_per_run // self.nodes  # of a run's devices on a node
        processes = share if self.nodes > 1 else 1  # on a node that Slurm starts; on one alone, they start each other
        cpus = max(1, (self.cpus or self.threads * len(self.devices) * share) // processes)
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
        worker = sbatch.Worker(site.mupsweep("worker"), self.devices, self.threads, self.shard, self.nodes, cpus)
        header = sbatch.header(comment, options, login=bool(self.modules))
        return sbatch.array_script(header, self._preamble(), tasks, worker, self.max_restarts)

    def analysis_text(self, site: Site, searches: bool = False) -> str:
        """The script of the job after the arrays, from nothing but its arguments. In a search it submits what follows:
        arrays, and itself after them."""
        options = [*self._shared_options(site, ANALYSIS, "%x-%j.out"), "--ntasks=1", *self.analysis_options]
        comment = ["Analyses the sweep as it is; submitted to start after the arrays with --dependency=afterany:JOBS"]
        header = sbatch.header(comment, options, login=bool(self.modules))
        return sbatch.analysis_script(header, self._preamble(), site.mupsweep("report", *NEXT * searches))

    def _shared_options(self, site: Site, name: str, log: str) -> Iterator[str]:
        """The options that arrays and the analysis have in common."""
        yield f"--job-name={re.sub('[^A-Za-z0-9_.-]', '_', site.sweep)}-{name}"
        yield f"--output={sbatch.file_pattern(site.logs, log)}"
        yield "--open-mode=append"
        yield f"--chdir={site.cwd}"
        for key in ("partition", "account", "qos", "constraint"):
            if getattr(self, key) is not None:
                yield f"--{key}={getattr(self, key)}"

    def _preamble(self) -> list[str]:
        return [*(f"module load {shlex.quote(module)}" for module in self.modules), *self.setup]


def bundled(lengths: Mapping[str, float], workers: int, target: float) -> list[sbatch.Task]:
    """Runs in tasks of about equal length: as few as the target allows, or where runs are longer, one per worker.

    Args:
        lengths: seconds that each run takes on one worker.
        workers: of a task, which share its runs.
        target: seconds that a task may take.
    """
    count = min(math.ceil(len(lengths) / workers), math.ceil(sum(lengths.values()) / (target * workers)))
    bundles: list[tuple[float, int, list[str]]] = [(0.0, i, []) for i in range(count)]
    for run_id, seconds in sorted(lengths.items(), key=lambda item: (-item[1], item[0])):
        total, i, members = bundles[0]  # the longest run that is left goes into the shortest bundle
        heapq.heapreplace(bundles, (total + seconds, i, [*members, run_id]))
    bundles.sort(key=lambda bundle: bundle[1])
    return [
        sbatch.Task(tuple(members), max(total / workers, *(lengths[run_id] for run_id in members)))
        for total, _, members in bundles
    ]


def submit(sweep: SweepDir, script: Path, tasks: Sequence[Sequence[str]], *options: str) -> str:
    """Hand a script to sbatch and record the job's id.

    Raises:
        ConfigError: sbatch is not there or refuses the script.
    """
    hint = "; change launcher.* and run the same command again"
    with defer_signals():  # a Ctrl-C would leave a job that nobody remembers
        job = call("sbatch", "--parsable", *options, str(script), hint=hint)
        job = job.strip().partition(";")[0]  # a federation adds its cluster
        sweep.write_job(job, script, tasks)
    return job


def was_cancelled(jobs: Sequence[Mapping[str, Any]], queue: slurm_queue.Queue) -> bool:
    """Whether this process is an analysis of the sweep that Slurm is about to end; it must not submit any more."""
    mine = slurm_queue.own_job()["slurm_job"]
    alive = {job.job_id for job in queue.analysis if job.state == "RUNNING"}
    return mine in {job["job"] for job in jobs} - alive


def cancel(sweep: SweepDir) -> None:
    """Stop the queued and running jobs of a sweep, the next rounds of a search included; what they trained is kept."""
    with sweep.lock():  # an analysis may be submitting: its jobs are recorded when it is done, or it sees its end
        queue = slurm_queue.of_sweep(sweep.read_jobs())
        jobs = [*(job.job_id for job in queue.analysis), *queue.arrays]  # the analysis first, or it would start
        if jobs:
            call("scancel", "--quiet", *jobs)
    if jobs:
        held = counted(len(queue.runs), "run")
        _tell(f"cancelled jobs {', '.join(jobs)} with {held}; those in progress checkpoint and end")
        _tell("go on with the command that made the sweep")
    else:
        _tell(f"no Slurm job of {sweep.path} is queued or running")
    others = [row["run_id"] for row in sweep.read_plan() if sweep.state(row["run_id"])["status"] == RUNNING]
    if others := set(others) - set(queue.runs):
        _tell(f"trained on outside Slurm: {counted(len(others), 'run')}; stop where started")


def max_array_size() -> int:
    """How many tasks the cluster takes in one array."""
    try:
        settings = call("scontrol", "show", "config")
    except ConfigError:
        return DEFAULT_MAX_ARRAY
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", settings, re.MULTILINE)
    limit = int(found[1]) if found else DEFAULT_MAX_ARRAY
    if limit == 0:
        raise ConfigError("this cluster takes no job arrays (MaxArraySize=0): in a job of your own use launcher=local")
    return limit


def call(*command: str, hint: str = "") -> str:
    """What one of Slurm's commands prints.

    Raises:
        ConfigError: it is not there, fails or does not answer.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=slurm_queue.outside())
    except OSError as error:
        raise ConfigError(
            f"cannot run {command[0]} ({error.strerror}): launcher=slurm works on a machine that submits to a Slurm "
            "cluster; elsewhere use launcher=local"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"{shlex.join(command)} did not answer within {SECONDS:.0f}s; try again") from error
    if done.returncode:
        said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError(f"{shlex.join(command)} failed: {said}{hint}")
    return done.stdout


def _write(sweep: SweepDir, name: str, text: str) -> Path:
    make_folder(sweep.logs)  # Slurm makes no folder for a job's output
    write_text(sweep.script(name), text)
    return sweep.script(name)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)
