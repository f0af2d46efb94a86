"""The workers of a job's task, under a supervisor that Slurm signals: `mupsweep worker --restarts`."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections import Counter
from dataclasses import dataclass, field

from mupsweep.launchers.worker_pool import POLL_SECONDS, WorkerPool
from mupsweep.training.signals import STOPPED, StopSignal

# The shell that srun starts for every process: Slurm's variables as torchrun names them.
SRUN_SHELL = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID MASTER_ADDR=$SLURM_LAUNCH_NODE_IPADDR "
    'MASTER_PORT=$1 WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$2; shift 2; exec "$@"'
)


@dataclass
class TaskPool(WorkerPool):
    """Workers that share the runs of a task; one that a signal kills, as the kernel does for memory, is replaced.

    Attributes:
        restarts: how often each slot's worker is replaced.
        nodes: how many nodes train each run together, by srun; `slots` then names the devices of each node.
        requeue: how often Slurm may queue the task again at its time limit.
        deaths: how many workers of each slot a signal has killed.
        recorded: how many failures the ranks of several nodes have recorded, each of which counts against its run.
    """

    restarts: int = 0
    nodes: int = 1
    requeue: int = 0
    deaths: Counter[int] = field(default_factory=Counter)
    recorded: int = 0

    def supervise(self) -> int:
        """Train the task's runs and return its exit code.

        USR1 comes before the time limit: the task is queued again, to go on from the checkpoints. TERM comes when the
        job is cancelled, preempted or requeued; a preempted job is queued again by Slurm itself.
        """
        stop = StopSignal.install()
        code = self.train(stop)
        if signal.SIGUSR1 in stop.received:
            from mupsweep.launchers.slurm_jobs import (
                requeue,  # late: until signals are handled, one of them ends the task
            )

            requeue(self.requeue)
        return code

    def train(self, stop: StopSignal) -> int:
        """Wait until every worker has ended; return 0, or the exit code of the last slot that failed or was stopped.

        A stop signal reaches all workers, which checkpoint and end; from then on none is replaced.
        """
        self.recorded = self.sweep.count_failures()
        self.start()
        stopping = False
        while True:
            if stop.signalled and not stopping:
                stopping = True
                self.signal(signal.SIGUSR1)  # which srun hands on to its processes, unlike SIGINT and SIGTERM
            codes = [self.poll(index, replace=not stop.signalled) for index in range(len(self.slots))]
            if None not in codes:
                return next((code for code in reversed(codes) if code), 0)
            time.sleep(POLL_SECONDS)

    def poll(self, index: int, replace: bool) -> int | None:
        """Return how a slot's worker ended, a signal as 128 and its number; None where one still works.

        Args:
            replace: start another worker where a signal killed this one and the slot has restarts left, or ranks have
                recorded why they ended, until their run has failed.
        """
        code = self.workers[index].poll()
        if code is not None and code < 0:
            code = 128 - code  # as shells and srun report a signal
        if code is None or code <= 128 or code == STOPPED or not replace:
            return code
        recorded = self.sweep.count_failures()
        if recorded == self.recorded:
            if self.deaths[index] == self.restarts:
                return code
            self.deaths[index] += 1
        self.recorded = recorded
        when, device = time.strftime("%FT%T"), self.slots[index]
        print(f"{when} the worker on {device} ended with code {code}; starting another", file=sys.stderr, flush=True)
        self.spawn(index)
        return None

    def command(self, index: int) -> list[str]:
        """Return the command line of a slot's worker; over several nodes, of the srun that starts its processes."""
        worker = super().command(index)
        if self.nodes == 1:
            return worker
        processes = len(self.slots[index].split(","))
        srun = ["srun", f"--nodes={self.nodes}", f"--ntasks-per-node={processes}", "--kill-on-bad-exit"]
        if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):  # srun does not take it from the job
            srun.append(f"--cpus-per-task={cpus}")
        return [*srun, "bash", "-c", SRUN_SHELL, "mupsweep", str(free_port()), str(processes), *worker]


def free_port() -> int:
    """Return a port of this machine that nobody listens on; srun starts rank 0 here."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
