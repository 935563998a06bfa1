"""A real Slurm for tests: munged, slurmctld and a slurmd for each of two virtual nodes.

Needs the programs of Debian's packages slurm-wlm and munge, and root or user names of its own for them;
nothing under /etc is read or written, and nothing but what was started here is ended.
"""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
CPUS = 8  # of each virtual node, whatever this machine has
BRIDGE = "ftpipebr"

CONF = """\
ClusterName=ftpipe
SlurmctldHost={host}({address})
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmdSpoolDir={root}/spool.%n
AuthType=auth/munge
CredType=cred/munge
# how long a requeued job waits before it may start again: 120 s by default, 5 s at least
AuthInfo=socket={root}/run/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
EnforcePartLimits=ALL
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobRequeue=1
KillWait=5
# minutes: a machine that is busy may be late for the limit of a minute
OverTimeLimit=1
# more processors than this machine may have
SlurmdParameters=config_overrides
MinJobAge=86400
ReturnToService=0
GresTypes=gpu
{nodes}
PartitionName=main Nodes=ALL Default=YES DefaultTime=10 MaxTime=60 PriorityTier=10 PreemptMode=OFF
PartitionName=low Nodes=ALL DefaultTime=10 MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=90
"""


def missing() -> str:
    """Return why no cluster can be started here; "" if one can."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    lacking = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if lacking:
        return f"no {', '.join(lacking)} here: apt-get install slurm-wlm munge"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--uts", "--mount", "true"]).returncode:
        return "only root can give each virtual node a host name of its own"
    return ""


def no_networks() -> str:
    """Return why the nodes cannot have a network of their own each; "" if they can."""
    if shutil.which("ip", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        return "no ip here: apt-get install iproute2"
    tried = subprocess.run(
        ["ip", "link", "add", BRIDGE, "type", "bridge"], capture_output=True, text=True
    )
    if tried.returncode:
        return f"no right to make networks here: {tried.stderr.strip()}"
    subprocess.run(["ip", "link", "del", BRIDGE], check=True)
    return ""


@dataclass
class Cluster:
    """A cluster below ``root``.

    Attributes:
        networks: whether each node has a network namespace of its own, so that a rank which looks for
            the others at "localhost" finds nobody.
    """

    root: Path
    networks: bool = False
    daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """The environment in which Slurm's commands speak to this cluster, and to no other."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        return {
            **kept,
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
            # jobs start where no test has put its interpreter on the path
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self.daemons:
            self.run("scancel", f"--user={getpass.getuser()}")
            self.wait_for(lambda: not self.run("squeue", "--noheader").stdout, 30, quiet=True)
        for name in ("slurmd.n1", "slurmd.n2", "slurmctld", "munged"):
            daemon = self.daemons.pop(name, None)
            if daemon is not None:
                daemon.terminate()
                try:
                    daemon.wait(15)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
        if self.networks:
            for node in NODES:
                self.run("ip", "netns", "del", f"ftpipe{node}")
            self.run("ip", "link", "del", BRIDGE)

    def run(self, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=self.env, cwd=cwd, capture_output=True, text=True, timeout=120)

    def wait_for(self, holds: object, seconds: float, quiet: bool = False) -> bool:
        assert callable(holds)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if holds():
                return True
            time.sleep(0.1)
        assert quiet, f"not after {seconds} s: {self.run('scontrol', 'show', 'job').stdout[-3000:]}"
        return False

    def show(self, job: str) -> Mapping[str, str]:
        """Return what scontrol says of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(word.partition("=")[::2] for word in text.split())

    def ends(self, job: str, seconds: float = 120) -> str:
        """Wait until a job has ended for good, and return its last state."""
        waits = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED")
        self.wait_for(lambda: self.show(job).get("JobState", "GONE") not in waits, seconds)
        return self.show(job).get("JobState", "GONE")

    def _start(self) -> None:
        root = self.root
        for name in ("munge", "run", "log", "state", "dev", *(f"spool.{node}" for node in NODES)):
            (root / name).mkdir(parents=True, exist_ok=True)
        (root / "munge").chmod(0o700)
        (root / "munge/key").write_bytes(os.urandom(128))
        (root / "munge/key").chmod(0o400)
        for parent in (root, *root.parents[:2]):  # munged asks that others may reach its socket
            parent.chmod(parent.stat().st_mode | 0o011)
        self._configure()
        run, munge = root / "run", root / "munge"
        self._daemon(
            *("munged", "munged", "--foreground", "--force", f"--key-file={munge}/key"),
            *(f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid"),
            *(f"--log-file={munge}/log", f"--seed-file={munge}/seed"),
        )
        self.wait_for((run / "munge.sock").exists, 10)
        if self.networks:
            self._network()
        self._daemon("slurmctld", "slurmctld", "-D")
        self.wait_for(lambda: "is UP" in self.run("scontrol", "ping").stdout, 30)
        for node in NODES:
            self._daemon(f"slurmd.{node}", *self._around(node))
        self.wait_for(
            lambda: (
                self.run("sinfo", "-h", "-N", "-o", "%t", "-p", "main").stdout.split() == ["idle"] * 2
            ),
            30,
        )

    def _around(self, node: str) -> Sequence[str]:
        """Return the words that start a node's slurmd with a host name and a network of its own."""
        enter = (
            f"hostname {node}; mount --bind {self.root}/hosts /etc/hosts; "
            f"mount --bind {self.root}/resolv.conf /etc/resolv.conf; exec slurmd -D -N {node}"
        )
        net = ("nsenter", f"--net=/run/netns/ftpipe{node}") if self.networks else ()
        return (*net, "unshare", "--uts", "--mount", "sh", "-c", enter)

    def _daemon(self, name: str, *words: str) -> None:
        with (self.root / "log" / f"{name}.out").open("wb") as log:
            self.daemons[name] = subprocess.Popen(
                words,
                env=self.env,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def _configure(self) -> None:
        root, host = self.root, socket.gethostname().split(".")[0]
        net = "10.78.0" if self.networks else "127.0.78"
        address = f"{net}.1" if self.networks else "127.0.0.1"
        places = {node: f"{net}.{10 + at}" for at, node in enumerate(NODES)}
        named = "".join(f"{place} {node}\n" for node, place in places.items())
        (root / "hosts").write_text(f"127.0.0.1 localhost\n{address} {host}\n{named}")
        (root / "resolv.conf").write_text(
            "nameserver 127.0.0.1\n"
        )  # a name that is not in hosts fails at once
        (root / "cgroup.conf").write_text(
            "CgroupPlugin=cgroup/v1\n"
        )  # read, though nothing here uses any
        for number in (0, 1):
            (root / f"dev/gpu{number}").symlink_to("/dev/null")
        (root / "gres.conf").write_text(f"NodeName=n[1-2] Name=gpu File={root}/dev/gpu[0-1]\n")
        ports = _free_ports(1 + len(NODES))
        nodes = "\n".join(
            f"NodeName={node} NodeAddr={places[node]} Port={port} CPUs={CPUS} RealMemory=8000 Gres=gpu:2"
            for node, port in zip(NODES, ports[1:], strict=True)
        )
        (root / "slurm.conf").write_text(
            CONF.format(
                host=host, address=address, user=getpass.getuser(), port=ports[0], root=root, nodes=nodes
            )
        )

    def _network(self) -> None:
        """Give each node a network of its own, joined by a bridge that has this machine's address."""

        def ip(*words: str) -> None:
            done = self.run("ip", *words)
            assert done.returncode == 0, (words, done.stderr)

        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", "10.78.0.1/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for at, node in enumerate(NODES):
            space, end = f"ftpipe{node}", f"ftpipe-{node}"
            ip("netns", "add", space)
            ip("link", "add", end, "type", "veth", "peer", "name", "eth0", "netns", space)
            ip("link", "set", end, "master", BRIDGE, "up")
            ip("-n", space, "addr", "add", f"10.78.0.{10 + at}/24", "dev", "eth0")
            ip("-n", space, "link", "set", "lo", "up")
            ip("-n", space, "link", "set", "eth0", "up")


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports
