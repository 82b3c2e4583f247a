"""Before Ray starts the workers: whether their nodes have this package, in this version.

Without the question a node that lacks it fails while Ray unpacks a worker's arguments, in a
traceback that names neither the node nor what to do.
"""

from __future__ import annotations

import socket
from typing import Any

CONNECT_TIMEOUT_S = 10
# A node that does not answer: its raylet is alive for Ray, but starts no processes.
ANSWER_TIMEOUT_S = 120


def check_address(address: str | None) -> None:
    """Refuse a cluster that nobody answers for; Ray itself tries for minutes.

    Parameters
    ----------
    address : str or None
        Of ``RAY_ADDRESS``: ``host:port``, ``ray://host:port``, or a word such as ``auto``.

    Raises
    ------
    ValueError
        Nothing listens there, or the host is unknown or out of reach.
    """
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
    except OSError as error:
        raise ValueError(
            f"medusa: the Ray cluster at RAY_ADDRESS={address} cannot be reached ({error}); start "
            "it, or correct the address"
        ) from None


def complaint(report: dict[str, Any], medusa_version: str, vllm_version: str) -> str | None:
    """What is wrong with a node, in one sentence; None: nothing.

    Parameters
    ----------
    report : dict
        What :func:`ask_nodes` found: ``node``, ``medusa``, ``vllm`` (versions or None),
        ``entry_point`` (whether vLLM finds the plugin there) and ``python``.
    medusa_version, vllm_version : str
        Of this process.

    Examples
    --------
    >>> complaint({"node": "n2 (10.0.0.2)", "medusa": None, "python": "/usr/bin/python3"}, "1", "1")
    "Ray node n2 (10.0.0.2) has no vllm-medusa for /usr/bin/python3; install version 1 there"
    """
    node = f"Ray node {report['node']}"
    if report["medusa"] is None:
        return (
            f"{node} has no vllm-medusa for {report['python']}; install version {medusa_version} "
            "there"
        )
    if report["medusa"] != medusa_version:
        return (
            f"{node} has vllm-medusa {report['medusa']}, this one {medusa_version}; install the "
            "same version on all nodes"
        )
    if report["vllm"] != vllm_version:
        return (
            f"{node} has vLLM {report['vllm']}, this one {vllm_version}; install the same version "
            "on all nodes"
        )
    if not report["entry_point"]:
        return (
            f"{node} can import vllm-medusa but its vLLM does not find the plugin; install the "
            "package there instead of copying its files"
        )
    return None


def check_nodes(parallel_config: Any, placement_groups: list[Any]) -> None:
    """Ask every node on which a worker will run.

    Parameters
    ----------
    parallel_config : vllm.config.ParallelConfig
        Nothing is asked for another worker class than ours.
    placement_groups : list of ray.util.placement_group.PlacementGroup
        Where Ray will start the workers, or one engine of several with its workers each.

    Raises
    ------
    ValueError
        Naming the first node that cannot run our workers.
    """
    if not str(parallel_config.worker_cls).startswith("vllm_medusa."):
        return
    from vllm_medusa import __version__, vllm_seams

    reports = ask_nodes(placement_groups, parallel_config.ray_runtime_env)
    for report in reports:
        found = complaint(report, __version__, vllm_seams.vllm_version())
        if found:
            raise ValueError(found)


def ask_nodes(placement_groups: list[Any], runtime_env: Any) -> list[dict[str, Any]]:
    """One report of every node in placement groups, made in a process as workers get it."""
    import ray
    from ray.util.placement_group import placement_group_table
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def report() -> dict[str, Any]:
        # Runs where vllm_medusa may be missing: Ray sends this function's code along.
        import importlib.metadata
        import importlib.util
        import runpy
        import socket
        import sys
        from pathlib import Path

        try:
            from vllm_medusa import __version__ as medusa
        except ImportError:
            medusa = None
        vllm = importlib.util.find_spec("vllm")
        if vllm is not None:
            # Importing vLLM takes seconds.
            vllm = runpy.run_path(str(Path(vllm.origin).with_name("_version.py")))["__version__"]
        points = importlib.metadata.entry_points(group="vllm.general_plugins")
        return {
            "node": f"{socket.gethostname()} ({ray.util.get_node_ip_address()})",
            "medusa": medusa,
            "vllm": vllm,
            "entry_point": any(point.value.startswith("vllm_medusa.") for point in points),
            "python": sys.executable,
        }

    for group in placement_groups:
        group.wait(ANSWER_TIMEOUT_S)  # those of replicas may still be waiting for their places
    tables = [placement_group_table(group) for group in placement_groups]
    nodes = sorted({n for table in tables for n in table["bundles_to_node_id"].values()})
    remote = ray.remote(num_cpus=0, max_retries=0)(report)
    asked = {
        node: remote.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False),
            runtime_env=runtime_env,
        ).remote()
        for node in nodes
    }
    reports = []
    for node, answer in asked.items():
        try:
            reports.append(ray.get(answer, timeout=ANSWER_TIMEOUT_S))
        except ray.exceptions.RayError as error:
            addresses = {n["NodeID"]: n["NodeManagerAddress"] for n in ray.nodes()}
            raise ValueError(
                f"Ray node {addresses.get(node, node)} does not run Python tasks: {error}"
            ) from None
    return reports
