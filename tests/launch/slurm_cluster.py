"""A real Slurm of two nodes on one machine, in namespaces of its own: nothing of it is left behind.

    python tests/launch/slurm_cluster.py squeue          # start it, run a command in it, end it

Needs root on Debian or Ubuntu; `install` fetches slurmctld, slurmd, slurm-client and munge where they are missing.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
START_SECONDS = 60
CONFIG = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
SlurmctldPort=16817
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=bf_interval=3,sched_interval=3
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
KillWait=30
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n1 NodeAddr=127.0.0.1 Port=17001 CPUs=2 State=UNKNOWN
NodeName=n2 NodeAddr=127.0.0.1 Port=17002 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60 MaxTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF MaxTime=60
"""
# munged wants a key and folders of its own; the nodes' names are known in this mount namespace only.
START = """\
set -e
cd "$0"
mount --bind hosts /etc/hosts
munged --force --key-file=munge.key --socket=munge.socket --seed-file=munge.seed --pid-file=munge.pid \\
    --log-file=munge.log
slurmctld -c
for node in n1 n2; do slurmd -N "$node"; done
echo started
exec sleep infinity
"""


def missing() -> str:
    """Why no cluster can be started here; empty if one can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "needs root on Linux"
    if not all(map(shutil.which, PROGRAMS)) and not shutil.which("apt-get"):
        return f"needs {', '.join(PROGRAMS)}, or apt-get to install them"
    probe = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True)
    return "" if probe.returncode == 0 else "needs mount and pid namespaces"


def install() -> None:
    """Fetch Debian's packages where they are missing."""
    if all(map(shutil.which, PROGRAMS)):
        return
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        subprocess.run(["apt-get", "-qq", *command], check=True, env=environment)


@dataclass
class Cluster:
    """A running cluster.

    Attributes:
        folder: of its state and logs.
        init: process in whose namespaces it lives.
    """

    folder: Path
    init: int
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, *command: str, cwd: Path, check: bool = True, text: str | None = None) -> str:
        """What *command*, run in the cluster, prints."""
        inside = ["nsenter", "--target", str(self.init), "--mount", "--pid", f"--wdns={cwd}"]
        done = subprocess.run([*inside, *command], env=self.environment, capture_output=True, text=True, input=text)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self.logs()}"
        return done.stdout

    def show(self, job: str) -> dict[str, str]:
        """What Slurm knows of a job, such as JobState, Restarts, ExitCode."""
        words = self.run("scontrol", "--oneliner", "show", "job", job, cwd=self.folder).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, job: str, states: tuple[str, ...], seconds: float) -> dict[str, str]:
        """The job, as soon as its state is one of *states*."""
        end = time.monotonic() + seconds
        while (seen := self.show(job))["JobState"] not in states:
            assert time.monotonic() < end, f"{seen}\n{self.logs()}"
            time.sleep(0.5)
        return seen

    def logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"== {log}\n{log.read_text()[-3000:]}" for log in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the cluster; its processes end with the block, whatever happens."""
    install()
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        folder = Path(name)
        _write(folder)
        environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        namespaces = [
            "setpriv",
            "--pdeathsig",
            "KILL",
            "unshare",
            "--mount",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
        ]
        log = (folder / "start.log").open("w")
        outer = subprocess.Popen([*namespaces, "bash", "-c", START, name], env=environment, stdout=log, stderr=log)
        try:
            running = Cluster(folder, 0, environment)
            running.init = _init_of(outer, running)
            _wait_until_idle(running)
            yield running
        finally:
            outer.kill()
            outer.wait()
            log.close()


def _write(folder: Path) -> None:
    (folder / "state").mkdir()
    host = os.uname().nodename
    (folder / "slurm.conf").write_text(CONFIG.format(host=host, folder=folder))
    (folder / "hosts").write_text(f"127.0.0.1 localhost {host} n1 n2\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    for node in ("n1", "n2"):
        (folder / node).mkdir()


def _init_of(outer: subprocess.Popen[bytes], running: Cluster) -> int:
    end = time.monotonic() + START_SECONDS
    while "started" not in (running.folder / "start.log").read_text():
        assert outer.poll() is None, running.logs()
        assert time.monotonic() < end, running.logs()
        time.sleep(0.2)
    children = Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split()
    return int(children[0])


def _wait_until_idle(running: Cluster) -> None:
    end = time.monotonic() + START_SECONDS
    while (
        running.run("sinfo", "-h", "-p", "low", "-t", "idle", "-o", "%D", cwd=running.folder, check=False).strip()
        != "2"
    ):
        assert time.monotonic() < end, running.run("sinfo", cwd=running.folder, check=False) + running.logs()
        time.sleep(0.5)


if __name__ == "__main__":
    with cluster() as started:
        print(started.run(*sys.argv[1:], cwd=Path.cwd(), check=False), end="")
