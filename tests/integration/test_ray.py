"""A local Ray cluster on a CPU: the plugin reaches its workers, and what goes wrong is said.

The cluster is started by the script in examples/ and told that it has GPUs; the tests' plugin
gives vLLM a CPU platform that counts them.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import cluster_plugin
import pytest
from test_families import token_ids
from test_parallel import DIED, TWO, job

pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(1500)]

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "start_ray_cluster.sh"
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}


def free_port() -> int:
    """A port that nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Cluster:
    """Nodes of one Ray cluster, all on this machine."""

    def __init__(self, env: dict[str, str], folder: Path):
        self.env = {**os.environ, **QUIET, **env, "PYTHON": sys.executable}
        self.folder, self.port = folder, free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[subprocess.Popen] = []

    def start(self, role: list[str], num_gpus: int, *prefix: str, **env: str) -> None:
        """Add a node, run by the command ``prefix``."""
        arguments = f"--block --num-cpus=2 --num-gpus={num_gpus}"
        if role == ["head"]:
            arguments += f" --temp-dir={self.folder}"
        log = (self.folder / f"node{len(self.nodes)}.log").open("w")
        node = subprocess.Popen(
            [*prefix, "bash", SCRIPT, *role],
            env={**self.env, "RAY_PORT": str(self.port), "NODE_IP": "127.0.0.1",
                 "RAY_ARGS": arguments, **env},
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
        self.nodes.append(node)
        while "Ray runtime started" not in Path(log.name).read_text():
            assert node.poll() is None, Path(log.name).read_text()
            time.sleep(0.5)

    def stop(self) -> None:
        """End the processes of all nodes, and of nobody else."""
        for node in reversed(self.nodes):
            node.terminate()
        for node in self.nodes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                node.wait(30)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)


@pytest.fixture
def new_cluster(cluster_env, tmp_path_factory):
    """``new_cluster() -> Cluster`` without a node yet."""
    made = []

    def make() -> Cluster:
        # Ray's sockets want a short path.
        folder = Path("/tmp") / f"medusa-ray-{os.getpid()}-{len(made)}"
        folder.mkdir()
        made.append(Cluster(cluster_env, folder))
        return made[-1]

    yield make
    for cluster in made:
        cluster.stop()
        shutil.rmtree(cluster.folder, ignore_errors=True)


def ray_job(tiny, **options) -> dict:
    """As of test_parallel, its workers on Ray."""
    return job(tiny, distributed_executor_backend="ray", **options)


def one_by_one(run_series, tiny, env: dict[str, str], prefix: tuple[str, ...] = ()) -> dict:
    """Each engine in a process of its own: vLLM keeps its placement group until that ends."""
    jobs = {"one": job(tiny)} | {name: ray_job(tiny, **options) for name, options in TWO.items()}
    return {name: run_series({name: j}, env, prefix)[name] for name, j in jobs.items()}


def test_ray_workers_return_what_one_worker_returns(tiny, run_series, cluster_env, new_cluster):
    cluster = new_cluster()
    cluster.start(["head"], num_gpus=2)
    env = cluster_env | QUIET | {"RAY_ADDRESS": cluster.address}
    results = one_by_one(run_series, tiny, env)
    for name in TWO:
        assert token_ids(results[name]) == token_ids(results["one"])
        assert results[name]["counters"] == results["one"]["counters"]
        assert min(results[name]["accepted"]) > 50


def test_replicas_on_ray_return_what_one_worker_returns(
    tiny, run_series, run_replicas, cluster_env, new_cluster
):
    cluster = new_cluster()
    cluster.start(["head"], num_gpus=2)
    env = cluster_env | QUIET | {"RAY_ADDRESS": cluster.address}
    found = run_replicas(job(tiny, data_parallel_size=2, data_parallel_backend="ray"), env)
    expected = run_series({"one": job(tiny)}, cluster_env)["one"]
    assert token_ids(found) == token_ids(expected)
    # Both replicas drafted, and got what they drafted accepted.
    assert sorted(found["accepted"]) == ["0", "1"] and min(found["accepted"].values()) > 50


# Ray puts the driver's import path before a node's own, so what a node lacks is taken out when
# its Pythons start.
SPOILT = {
    "another version": (
        "import vllm_medusa\nvllm_medusa.__version__ = '0.0.1'\n",
        "has vllm-medusa 0.0.1, this one",
    ),
    "no package": (
        "import sys\nsys.modules['vllm_medusa'] = None\n",
        "has no vllm-medusa for",
    ),
}


def cluster_with_a_spoilt_node(new_cluster, cluster_env, folder: Path, source: str) -> Cluster:
    """Two nodes; ``source`` runs when a Python of the second one starts."""
    (folder / "sitecustomize.py").write_text(source)
    cluster = new_cluster()
    cluster.start(["head"], num_gpus=1)
    paths = os.pathsep.join([str(folder), cluster_env["PYTHONPATH"]])
    cluster.start(["worker", cluster.address], num_gpus=1, PYTHONPATH=paths)
    return cluster


@pytest.mark.parametrize("spoilt", SPOILT)
def test_a_node_that_cannot_run_the_workers_is_named(
    tiny, run_series, cluster_env, new_cluster, tmp_path, spoilt
):
    source, expected = SPOILT[spoilt]
    cluster = cluster_with_a_spoilt_node(new_cluster, cluster_env, tmp_path, source)
    jobs = {"two": ray_job(tiny, **TWO["tensor"])}
    results = run_series(jobs, cluster_env | QUIET | {"RAY_ADDRESS": cluster.address})
    error = results["two"]["error"]
    assert error.startswith("ValueError: Ray node ") and expected in error, error


@pytest.mark.parametrize(
    ("misbehaviour", "expected"),
    [
        ("rank 1 has no heads", "cannot load the Medusa heads: /nowhere/heads"),
        ("rank 1 dies", DIED),
    ],
)
def test_what_goes_wrong_on_a_worker_ends_the_engine(
    tiny, run_series, cluster_env, new_cluster, misbehaviour, expected
):
    cluster = new_cluster()
    cluster.start(["head"], num_gpus=2)
    env = cluster_env | QUIET | {"RAY_ADDRESS": cluster.address}
    env[cluster_plugin.MISBEHAVIOUR] = misbehaviour
    results = run_series({"two": ray_job(tiny, **TWO["tensor"])}, env)
    assert re.search(expected, results["two"]["error"]), results["two"]["error"]


def test_a_cluster_that_cannot_be_reached_is_an_error(tiny, run_series, cluster_env):
    env = cluster_env | QUIET | {"RAY_ADDRESS": f"127.0.0.1:{free_port()}"}
    results = run_series({"two": ray_job(tiny, **TWO["tensor"])}, env)
    assert "cannot be reached" in results["two"]["error"], results["two"]["error"]


@pytest.fixture
def two_hosts():
    """Names and addresses of two network namespaces, joined by a cable."""
    tag = f"m{os.getpid()}"
    hosts = {f"{tag}a": "10.77.0.1", f"{tag}b": "10.77.0.2"}
    made = subprocess.run(["ip", "netns", "add", f"{tag}a"], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"no network namespaces here: {made.stderr.decode().strip()}")
    try:

        def run(*words: str) -> None:
            subprocess.run(["ip", *words], check=True)

        run("netns", "add", f"{tag}b")
        run("link", "add", f"{tag}a", "type", "veth", "peer", "name", f"{tag}b")
        for name, address in hosts.items():
            run("link", "set", name, "netns", name)
            run("-n", name, "link", "set", name, "name", "eth0")
            run("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            run("-n", name, "link", "set", "eth0", "up")
            run("-n", name, "link", "set", "lo", "up")
        yield hosts
    finally:
        for name in hosts:
            subprocess.run(["ip", "netns", "del", name], check=False)


@pytest.mark.long
def test_two_nodes_with_addresses_of_their_own(
    tiny, run_series, cluster_env, new_cluster, two_hosts
):
    cluster, (first, second) = new_cluster(), two_hosts
    # Host names mean nothing between the two.
    network = {"GLOO_SOCKET_IFNAME": "eth0"}
    cluster.address = f"{two_hosts[first]}:{cluster.port}"
    for role, name in ((["head"], first), (["worker", cluster.address], second)):
        prefix = ("ip", "netns", "exec", name)
        cluster.start(role, 1, *prefix, NODE_IP=two_hosts[name], **network)
    env = cluster_env | QUIET | network | {"RAY_ADDRESS": cluster.address}
    results = one_by_one(run_series, tiny, env, ("ip", "netns", "exec", first))
    for name in TWO:
        assert token_ids(results[name]) == token_ids(results["one"])
        assert results[name]["counters"] == results["one"]["counters"]


def complete(url: str, prompt: str) -> str:
    """Text of a greedy completion of the model that the application calls medusa."""
    body = {"model": "medusa", "prompt": prompt, "max_tokens": 24, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as response:
        return json.loads(response.read())["choices"][0]["text"]


@pytest.mark.long
def test_serve_application_answers_as_one_worker(
    tiny, run_series, cluster_env, new_cluster, tmp_path
):
    pytest.importorskip("ray.serve.llm", reason="ray[serve] and what ray.serve.llm imports")
    import tiny_tokenizer

    model = tmp_path / "model"
    shutil.copytree(tiny["model"], model)
    tokenizer = tiny_tokenizer.write_tokenizer(model)
    cluster = new_cluster()
    cluster.start(["head"], num_gpus=2)
    env = cluster.env | {"RAY_ADDRESS": cluster.address}
    options = [f"model={model}", f"heads={tiny['heads']}", "nodes=8", "dtype=float32"]
    options += ["max_model_len=256", "enforce_eager=true", "tensor_parallel_size=2"]
    options += ["kv_cache_memory_bytes=67108864"]
    command = [sys.executable, "-m", "ray.serve.scripts", "run", "examples.ray_serve_app:build"]
    log = (tmp_path / "serve.log").open("w")
    server = subprocess.Popen([*command, *options], cwd=ROOT, env=env, stdout=log, stderr=log)
    prompt, deadline = "hello", time.monotonic() + 600
    try:
        while True:
            assert server.poll() is None, Path(log.name).read_text()[-4000:]
            try:
                found = complete("http://127.0.0.1:8000", prompt)
                break
            except OSError:
                assert time.monotonic() < deadline, Path(log.name).read_text()[-4000:]
                time.sleep(2)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(60)
    params = {"max_tokens": 24, "temperature": 0.0}
    batch = {"prompts": [tokenizer(prompt)["input_ids"]], "sampling": [params]}
    expected = token_ids(run_series({"one": job(tiny) | {"batches": [batch]}}, cluster_env)["one"])
    assert found == tokenizer.decode(expected[0][0], skip_special_tokens=True)
