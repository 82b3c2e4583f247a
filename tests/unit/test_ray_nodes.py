"""What is said about a Ray node that cannot run the plugin's workers."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from vllm_medusa import cluster_seams, ray_nodes

GOOD = {"node": "n2 (10.0.0.2)", "medusa": "0.1.0", "vllm": "0.32.0", "entry_point": True,
        "python": "/usr/bin/python3"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"medusa": None}, "has no vllm-medusa for /usr/bin/python3; install version 0.1.0"),
        ({"medusa": "0.0.9"}, "has vllm-medusa 0.0.9, this one 0.1.0"),
        ({"vllm": "0.31.1"}, "has vLLM 0.31.1, this one 0.32.0"),
        ({"entry_point": False}, "its vLLM does not find the plugin"),
    ],
)
def test_complaint(change, expected):
    found = ray_nodes.complaint(GOOD | change, "0.1.0", "0.32.0")
    if expected is None:
        assert found is None
    else:
        assert found.startswith("Ray node n2 (10.0.0.2) ") and expected in found
        assert "\n" not in found


@pytest.mark.vllm
@pytest.mark.parametrize("ours", [True, False])
def test_only_our_workers_nodes_are_asked(monkeypatch, ours):
    """A sentence of the second node ends the start, before any worker exists."""
    from vllm_medusa import __version__, vllm_seams

    good = GOOD | {"medusa": __version__, "vllm": vllm_seams.vllm_version()}
    reports = [good, good | {"node": "n3 (10.0.0.3)", "medusa": None}]
    asked, order = [], []

    def ask_nodes(groups, env):
        asked.append(groups)
        return reports

    class Manager:
        @staticmethod
        def create_dp_placement_groups(vllm_config):
            order.append("replicas placed")
            return ["first", "second"], [0, 1]

    module = SimpleNamespace(
        initialize_ray_cluster=lambda config: order.append("workers placed"),
        CoreEngineActorManager=Manager,
    )
    monkeypatch.setattr(ray_nodes, "ask_nodes", ask_nodes)
    monkeypatch.setattr(cluster_seams, "RAY_EXECUTORS", ("one",))
    monkeypatch.setattr(cluster_seams, "after_import", lambda name, action: action(module))
    cluster_seams.after_ray_placement(ray_nodes.check_nodes)
    cluster_seams.after_ray_placement(ray_nodes.check_nodes)  # installed once
    worker = "vllm_medusa.worker.MedusaWorker" if ours else "vllm.v1.worker.gpu_worker.Worker"
    config = SimpleNamespace(worker_cls=worker, placement_group="group", ray_runtime_env=None)
    starts = (
        lambda: module.initialize_ray_cluster(config),
        lambda: Manager.create_dp_placement_groups(SimpleNamespace(parallel_config=config)),
    )
    for start in starts:
        if ours:
            with pytest.raises(ValueError, match=r"^Ray node n3 \(10.0.0.3\) has no vllm-medusa"):
                start()
        else:
            start()
    assert order == ["workers placed", "replicas placed"]
    assert asked == ([["group"], ["first", "second"]] if ours else [])


@pytest.mark.parametrize("address", [None, "", "auto", "local"])
def test_an_address_that_names_no_host_is_left_to_ray(address):
    ray_nodes.check_address(address)


def test_a_cluster_that_answers_is_accepted():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        ray_nodes.check_address(f"127.0.0.1:{port}")
        ray_nodes.check_address(f"ray://127.0.0.1:{port}")


def test_a_cluster_that_cannot_be_reached_is_named():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ValueError, match=rf"RAY_ADDRESS=127\.0\.0\.1:{port} cannot be reached"):
        ray_nodes.check_address(f"127.0.0.1:{port}")
