"""Two hosts that lose each other: `make hosts`, as root on Linux, with iproute2 and PostgreSQL; some minutes.

    this machine, 10.77.0.1     PostgreSQL, Prefect's server with a password before it, the store on S3 (moto)
    namespace `here`, .2        baton train, which places every stage of an iteration on a work pool
    namespace `there`, .3       the pool's worker

In the middle of an update `there` is cut off for a minute. The run has to reach its last iteration with no hand on it, and
its artifacts have to have the bytes of a run in one process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from pool import language_example  # noqa: E402
from s3 import BUCKET, CREDENTIALS  # noqa: E402

from flows.orchestration.pool import Processes, deploy  # noqa: E402
from flows.runs.run import open_run  # noqa: E402
from flows.store.store import Store  # noqa: E402

MIDDLE, HERE, THERE = "10.77.0.1", "10.77.0.2", "10.77.0.3"
POSTGRES, API, S3 = 5477, 4277, 5577  # ports
CUT = 60.0  # seconds
ITERATIONS = 3
PASSWORD = "secret"
PLACED = "execution.placement={rollout: baton, reference: baton, reward: baton, value: baton, gae: baton, ppo: baton}"


def main() -> int:
    if os.geteuid() != 0 or not (shutil.which("ip") and programs()):
        print("make hosts: needs root, iproute2 and PostgreSQL (Debian's packages iproute2, postgresql)", file=sys.stderr)
        return 2
    with TemporaryDirectory() as scratch, ExitStack() as resources:
        place = Path(scratch)
        place.chmod(0o755)
        example = language_example(place / "cut", ITERATIONS, seed=8)
        slow = ("--set", "ppo.epochs=300", "--set", "execution.threads=1", "--set", "tracking.enabled=false")
        print("one process", flush=True)
        baton("train", example, "--store", place / "local", *slow)
        hosts = resources.enter_context(network())
        resources.enter_context(postgres(place))
        environment = os.environ | CREDENTIALS | {
            "PREFECT_HOME": str(place / "home"), "PREFECT_API_URL": f"http://{MIDDLE}:{API}/api",
            "PREFECT_API_AUTH_STRING": f"admin:{PASSWORD}", "PREFECT_SERVER_API_AUTH_STRING": f"admin:{PASSWORD}",
            "PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://prefect:{PASSWORD}@127.0.0.1:{POSTGRES}/prefect",
            "AWS_ENDPOINT_URL": f"http://{MIDDLE}:{S3}", "PREFECT_WORKER_QUERY_SECONDS": "2",
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5"}
        processes = Processes(place, environment)
        resources.callback(processes.end)
        processes.start("s3", "moto.server", "-H", MIDDLE, "-p", str(S3))
        processes.start("server", "prefect", "server", "start", "--host", MIDDLE, "--port", str(API))
        processes.wait_for("server", f"http://{MIDDLE}:{API}/api/health")
        httpx.put(f"http://{MIDDLE}:{S3}/{BUCKET}").raise_for_status()
        deploy(environment, "--patience", "40")
        print(f"two hosts, {THERE} is cut off for {CUT:.0f} s in the middle of the update of iteration 2", flush=True)
        worker = start("there", environment | {"XDG_CACHE_HOME": str(place / "there")}, place / "worker.log", "prefect",
                       "worker", "start", "--pool", "baton", "--limit", "2")
        resources.callback(end, worker)
        run = start("here", environment | {"XDG_CACHE_HOME": str(place / "here")}, place / "run.log", "flows.cli.main",
                    "train", str(example), "--store", f"s3://{BUCKET}/store", *slow, "--set", PLACED)
        resources.callback(end, run)
        wait(lambda: updating(environment, 2), run, "the update of iteration 2")
        time.sleep(5)
        hosts("there", "down")
        time.sleep(CUT)
        hosts("there", "up")
        code = run.wait(900)
        print((place / "run.log").read_text(), end="")
        if code:
            print((place / "worker.log").read_text()[-5000:])
            print(f"the run ended with code {code}")
            return 1
        os.environ.update({name: environment[name] for name in (*CREDENTIALS, "AWS_ENDPOINT_URL")})
        differ = differences(open_run(Store(str(place / "local")), "cut"), open_run(Store(f"s3://{BUCKET}/store"), "cut"))
        print(f"{ITERATIONS} iterations, {len(differ)} artifacts with other bytes: {', '.join(differ) or 'none'}")
        return int(bool(differ))


def differences(ours: Any, theirs: Any) -> list[str]:
    """Artifacts of the one run that are others in the other."""
    return [f"{stage} of iteration {mine.iteration}"
            for mine, other in zip(ours.states(), theirs.states(), strict=True) for stage, ref in mine.artifacts.items()
            if other.artifacts[stage] != ref or ours.store.manifest(ref).digests() != theirs.store.manifest(ref).digests()]


def updating(environment: dict[str, str], iteration: int) -> bool:
    """Whether a worker is at that iteration's update."""
    answer = httpx.post(f"{environment['PREFECT_API_URL']}/flow_runs/filter", auth=("admin", PASSWORD), json={
        "flow_runs": {"name": {"any_": [f"ppo-{iteration:06d}"]}, "state": {"type": {"any_": ["RUNNING"]}}}})
    return bool(answer.raise_for_status().json())


# --- what hosts are made of ---

@contextmanager
def network() -> Iterator[Callable[[str, str], None]]:
    """Two namespaces on a bridge of this machine; yields what takes the link of one `down` or `up`."""
    def ip(*words: str, check: bool = True) -> None:
        subprocess.run(["ip", *words], check=check, capture_output=True)

    def remove() -> None:
        for name in ("here", "there"):
            ip("netns", "del", name, check=False)
            ip("link", "del", f"baton-{name}", check=False)
        ip("link", "del", "baton", check=False)

    remove()
    try:
        ip("link", "add", "baton", "type", "bridge")
        ip("addr", "add", f"{MIDDLE}/24", "dev", "baton")
        ip("link", "set", "baton", "up")
        for name, address in (("here", HERE), ("there", THERE)):
            ip("netns", "add", name)
            ip("link", "add", f"baton-{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"baton-{name}", "master", "baton")
            ip("link", "set", f"baton-{name}", "up")
            for words in (("addr", "add", f"{address}/24", "dev", "eth0"), ("link", "set", "eth0", "up"),
                          ("link", "set", "lo", "up")):
                ip("-n", name, *words)
        yield lambda name, state: ip("link", "set", f"baton-{name}", state)
    finally:
        remove()


def start(host: str, environment: dict[str, str], log: Path, *command: str) -> subprocess.Popen:
    """`python -m command` on that host."""
    with log.open("w") as out:
        return subprocess.Popen(["ip", "netns", "exec", host, sys.executable, "-m", *command], env=environment, cwd=ROOT,
                                stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)


def end(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 15)
    process.wait(60)


def programs() -> Path | None:
    """Where Debian has PostgreSQL's own."""
    return next(iter(sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)), None)


@contextmanager
def postgres(place: Path) -> Iterator[None]:
    """A cluster of its own with the database `prefect`, while it is up."""
    data = place / "postgres"
    data.mkdir()
    shutil.chown(data, "postgres", "postgres")

    def run(program: str, *words: str) -> None:
        subprocess.run(["runuser", "-u", "postgres", "--", str(programs() / program), *words], check=True, cwd="/",
                       stdout=subprocess.DEVNULL)

    run("initdb", "-D", str(data / "data"), "--auth-host=scram-sha-256", "--auth-local=trust")
    run("pg_ctl", "-D", str(data / "data"), "-w", "-l", str(data / "log"), "-o",
        f"-p {POSTGRES} -k {data} -c listen_addresses=127.0.0.1", "start")
    try:
        for statement in (f"CREATE USER prefect PASSWORD '{PASSWORD}'", "CREATE DATABASE prefect OWNER prefect"):
            run("psql", "-h", str(data), "-p", str(POSTGRES), "-c", statement)
        run("psql", "-h", str(data), "-p", str(POSTGRES), "-c", "CREATE EXTENSION pg_trgm", "prefect")
        yield
    finally:
        run("pg_ctl", "-D", str(data / "data"), "-m", "immediate", "stop")


def baton(*arguments: object) -> None:
    """On this machine, with a server of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    subprocess.run([sys.executable, "-m", "flows.cli.main", *map(str, arguments), "--quiet"], check=True, cwd=ROOT,
                   env=environment)


def wait(ready: Callable[[], bool], process: subprocess.Popen, what: str) -> None:
    deadline = time.monotonic() + 600
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"waited in vain for {what}; the run has ended with {process.returncode}")
        time.sleep(0.2)


if __name__ == "__main__":
    sys.exit(main())
