#!/usr/bin/env bash
# Start or join a Ray cluster whose nodes can run Medusa's workers.
#
#   examples/start_ray_cluster.sh head                 # on the first node; prints its address
#   examples/start_ray_cluster.sh worker ADDRESS:PORT  # on every other node
#
# Then, on the first node:
#
#   vllm serve MODEL --speculative-model medusa:PATH --distributed-executor-backend ray \
#       --tensor-parallel-size 8 --pipeline-parallel-size 2
#
# PYTHON chooses the interpreter (default: python3), RAY_PORT the head's port (6379), NODE_IP
# this node's address, RAY_ARGS what `ray start` gets besides (--num-gpus=8, --temp-dir=...).
# MODEL and PATH must lie at the same place on every node, and so must be this package.
set -euo pipefail

role="${1:-}"
python="${PYTHON:-python3}"
port="${RAY_PORT:-6379}"
args=(--disable-usage-stats ${NODE_IP:+"--node-ip-address=$NODE_IP"} ${RAY_ARGS:-})

case "$role" in
    head) args+=(--head "--port=$port" --include-dashboard=false) ;;
    worker)
        [ -n "${2:-}" ] || { echo "usage: $0 worker ADDRESS:PORT" >&2; exit 2; }
        args+=("--address=$2")
        ;;
    *) echo "usage: $0 head | worker ADDRESS:PORT" >&2; exit 2 ;;
esac

# Better here, by name, than in a worker of a running cluster.
"$python" - <<'CHECK'
import importlib.metadata, sys

for name in ("ray", "vllm-medusa"):
    try:
        print(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{name} is not installed for {sys.executable}; pip install it on this node")
CHECK

# In this process's place: what ends the script ends the node (with --block in RAY_ARGS).
exec "$python" -m ray.scripts.scripts start "${args[@]}"
