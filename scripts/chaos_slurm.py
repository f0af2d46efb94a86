"""The drill of chaos.py on a Slurm cluster of its own, whose daemons, nodes and jobs are among what dies."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from chaos import Drill

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "slurm"))
from cluster import NODES, Cluster, missing  # pyright: ignore[reportMissingImports]

from mupsweep.errors import RecordError
from mupsweep.store import slurm_queue

ON_SLURM = ["launcher=slurm", "launcher.device=cpu", "launcher.gpus=0", "launcher.minutes_per_task=0.1"]
ON_SLURM += ["launcher.sizes={w32-d2:{nodes:2,devices_per_run:2}}"]
DOWN = (1.0, 10.0)  # seconds that a daemon is away; slurmctld gives a node up after 5


class SlurmDrill(Drill):
    """Faults on sweeps that `launcher=slurm` submits.

    Attributes:
        down: what starts a daemon again, and when.
    """

    name = "slurm"

    def __init__(self, cluster: Any, folder: Path, words: list[str], rng: random.Random) -> None:
        super().__init__(folder, [*words, *ON_SLURM], rng)
        self.cluster = cluster
        self.down: dict[str, tuple[Callable[[], None], float]] = {}

    def own_faults(self) -> dict[str, Callable[[], bool]]:
        return {
            "node killed": self.kill_node,
            "slurmd killed": self.kill_slurmd,
            "slurmctld killed": self.kill_controller,
            "job requeued": lambda: self.on_a_job("scontrol", "requeue"),
            "job told USR1": lambda: self.on_a_job("scancel", "--batch", "--signal=USR1"),
            "job cancelled": lambda: self.on_a_job("scancel"),
        }

    def is_active(self) -> bool:
        """Whether the command runs, or jobs do; while nobody can tell, they do."""
        if super().is_active() or self.down:
            return True
        try:
            queue = slurm_queue.of_sweep(self.sweep.read_jobs())
        except RecordError:
            return True
        return bool(queue.arrays or queue.analysis)

    def is_complete(self) -> bool:
        return super().is_complete() and not self.is_active()

    def mend(self, everything: bool = False) -> None:
        super().mend(everything)
        for name, (start, until) in list(self.down.items()):
            if everything or time.monotonic() > until:
                del self.down[name]
                start()

    def close(self) -> None:
        super().close()
        with contextlib.suppress(subprocess.SubprocessError):
            self.cluster.ask("scancel", *(job["job"] for job in self.sweep.read_jobs()))

    def kill_node(self) -> bool:
        """A node with everything on it."""
        return self.take_down(self.rng.choice(NODES), self.cluster.fail_node)

    def kill_slurmd(self) -> bool:
        """A node's daemon; the job goes on."""
        return self.take_down(self.rng.choice(NODES), lambda node: self.cluster.kill(f"slurmd-{node}"))

    def take_down(self, node: str, kill: Callable[[str], None]) -> bool:
        if node in self.down or not self.cluster.has_host_names:
            return False
        kill(node)
        self.down[node] = (lambda: self.cluster.start_node(node)), time.monotonic() + self.rng.uniform(*DOWN)
        return True

    def kill_controller(self) -> bool:
        if "slurmctld" in self.down:
            return False
        self.cluster.kill("slurmctld")
        self.down["slurmctld"] = self.cluster.start_controller, time.monotonic() + self.rng.uniform(*DOWN)
        return True

    def on_a_job(self, *command: str) -> bool:
        """A command of Slurm on a running job."""
        if "slurmctld" in self.down:
            return False
        with contextlib.suppress(subprocess.SubprocessError):  # the job ended meanwhile
            jobs = self.cluster.ask("squeue", "--noheader", "--array", "--states=RUNNING", "--format=%i").split()
            if jobs:
                self.cluster.ask(*command, self.rng.choice(jobs))
            return bool(jobs)
        return False


def drill_on_slurm(stack: contextlib.ExitStack, folder: Path, words: list[str], rng: random.Random) -> list[Drill]:
    """The drill, with a cluster that lives as long as `stack`; nothing where Slurm is not installed."""
    if reason := missing():
        print(f"launcher=slurm: left out, {reason}")
        return []
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp")))  # sockets: a short path
    cluster = Cluster(root)
    os.environ["SLURM_CONF"] = str(cluster.conf)
    stack.callback(cluster.stop)
    cluster.start()
    return [SlurmDrill(cluster, folder, words, rng)]
