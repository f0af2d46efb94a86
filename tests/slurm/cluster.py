"""A Slurm cluster on this one machine, without systemd and cgroups, in a folder of its own.

    python tests/slurm/cluster.py start /tmp/cluster    # then: export SLURM_CONF=/tmp/cluster/slurm.conf
    python tests/slurm/cluster.py stop /tmp/cluster

Two nodes of two cores and two GPUs each; the GPUs are /dev/null, which Slurm counts and hands out all the same. Each
node has a host name of its own where the kernel allows it. Partitions: `debug`; `low`, from which `high` takes node n1.
"""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
INSTALL = "apt-get install slurmctld slurmd slurm-client munge"
NODES = ("n1", "n2")
# cred_expire is also how long a requeued job waits (120 s by default, 5 at least); KillWait: between TERM and KILL
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmdSpoolDir={root}/spool-%n
StateSaveLocation={root}/state
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
SlurmdParameters=config_overrides
SlurmdTimeout=5
ReturnToService=2
KillWait=10
MinJobAge=3600
MaxArraySize=10
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeHostname={hosts[0]} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=4000 Gres=gpu:2
NodeName=n2 NodeHostname={hosts[1]} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=4000 Gres=gpu:2
PartitionName=debug Nodes=ALL Default=YES PriorityTier=5 PreemptMode=OFF
PartitionName=low Nodes=n1 PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=n1 PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why no cluster can be started here."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    return f"no {', '.join(absent)} here: {INSTALL}" if absent else None


def until(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Wait until something is true, for so long at most; then say what Slurm did meanwhile."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds:.0f}s in vain: {what}\n{told()}"
        time.sleep(0.05)


def told() -> str:
    """The queue and the daemons' latest words, for whoever reads a failure."""
    squeue = subprocess.run(["squeue", "--array"], capture_output=True, text=True, timeout=30)
    logs = sorted(Path(os.environ.get("SLURM_CONF", "")).parent.glob("slurm*.log"))
    tails = [f"{path.name}:\n" + "\n".join(path.read_text().splitlines()[-20:]) for path in logs]
    return "\n".join([squeue.stdout + squeue.stderr, *tails])


@dataclass(frozen=True)
class Cluster:
    """A cluster in a folder, whose path is short: a socket's name has 107 characters at most."""

    root: Path

    @property
    def conf(self) -> Path:
        """What SLURM_CONF has to name."""
        return self.root / "slurm.conf"

    @property
    def has_host_names(self) -> bool:
        """Whether each node can have a host name of its own."""
        return subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0

    def start(self) -> None:
        """Write the configuration, start every daemon, wait until the nodes are idle."""
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (self.root / name).mkdir(parents=True)
        self.root.chmod(0o755)  # munged's clients have to reach its socket
        (self.root / "munge.key").write_bytes(os.urandom(64))
        (self.root / "munge.key").chmod(0o600)
        for gpu in ("gpu0", "gpu1"):
            (self.root / gpu).symlink_to("/dev/null")
        here = socket.gethostname().split(".")[0]
        hosts = NODES if self.has_host_names else (here, here)
        values = {"host": here, "hosts": hosts, "user": getpass.getuser(), "root": self.root, "ports": free_ports(3)}
        self.conf.write_text(CONF.format(**values))
        (self.root / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={self.root}/gpu[0-1]\n")
        (self.root / "cgroup.conf").write_text("CgroupAutomount=no\n")
        files = [f"--{name}={self.root}/munge.{end}" for name, end in (("socket", "sock"), ("key-file", "key"))]
        files += [f"--{name}={self.root}/munged.{end}" for name, end in (("pid-file", "pid"), ("log-file", "log"))]
        self._daemon("munged", *files, f"--seed-file={self.root}/munged.seed", "--num-threads=2")
        self.start_controller("-c")
        for node in NODES:
            self.start_node(node)
        until(lambda: self.idle() == set(NODES), f"nodes are not idle, see {self.root}/*.log", 60)

    def start_controller(self, *options: str) -> None:
        """Start slurmctld, which goes on with the jobs that it knew; with -c it knows none."""
        self._daemon("slurmctld", *options)

    def start_node(self, node: str) -> None:
        """Start a node's slurmd."""
        naming = ["unshare", "--uts", "sh", "-c", f'hostname {node}; exec "$@"', "-"] if self.has_host_names else []
        self._daemon(*naming, "slurmd", "-N", node)

    def idle(self) -> set[str]:
        """The nodes that wait for work."""
        return set(self.ask("sinfo", "--noheader", "-N", "--states=idle", "--format=%N").split())

    def fail_node(self, node: str) -> None:
        """Let a node die at once, with everything that runs on it. Needs host names."""
        namespace = os.readlink(f"/proc/{self._pid(f'slurmd-{node}')}/ns/uts")
        assert namespace != os.readlink("/proc/self/ns/uts")
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns/uts") == namespace:
                    os.kill(int(folder.name), signal.SIGKILL)
            except OSError:  # it ended meanwhile
                continue

    def kill(self, daemon: str) -> None:
        """End one daemon at once, as its crash would; the jobs go on."""
        pid = self._pid(daemon)
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            until(lambda: self._pid(daemon) is None, f"{daemon} to end", 30)

    def ask(self, *command: str) -> str:
        """What a client prints."""
        return subprocess.run(command, env=self._env, capture_output=True, text=True, check=True, timeout=30).stdout

    def stop(self) -> None:
        """Cancel every job, wait until it ended, and end the daemons, by their pid files."""
        try:
            if self._pid("slurmctld") is not None:
                self.ask("scancel", f"--user={getpass.getuser()}")
                until(lambda: not self.ask("squeue", "--noheader"), "the cancelled jobs to end", 60)
        finally:
            for name in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
                pid = self._pid(name)
                if pid is not None:
                    os.kill(pid, signal.SIGTERM)
                    until(lambda name=name: self._pid(name) is None, f"{name} to end", 30)

    def _pid(self, name: str) -> int | None:
        """A daemon's pid while it lives."""
        try:
            pid = int((self.root / f"{name}.pid").read_text())
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return None
        return None if state == "Z" else pid

    @property
    def _env(self) -> dict[str, str]:
        path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
        return {**os.environ, "SLURM_CONF": str(self.conf), "PATH": path}

    def _daemon(self, *command: str) -> None:
        null = subprocess.DEVNULL
        subprocess.run(command, env=self._env, stdin=null, stdout=null, stderr=null, check=True)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


if __name__ == "__main__":
    if sys.argv[1:2] not in (["start"], ["stop"]) or len(sys.argv) != 3:
        sys.exit(f"usage: {sys.argv[0]} start|stop FOLDER")
    if reason := missing():
        sys.exit(reason)
    getattr(Cluster(Path(sys.argv[2]).resolve()), sys.argv[1])()
