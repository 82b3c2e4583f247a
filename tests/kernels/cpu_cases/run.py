"""Run all cases in this process and save their outputs: ``python -m cpu_cases.run OUT``.

Under ``TRITON_INTERPRET=1`` the kernels are vLLM's own, else the fall-backs.
"""

import os
import sys
import zlib

import numpy as np
import torch


def main(path: str) -> None:
    """Run every case and save ``{case: {name: tensor}}``."""
    # Without this import the runner's modules see no CPU stand-ins for torch.cuda.
    if os.environ.get("TRITON_INTERPRET") != "1":
        from vllm.triton_utils.dispatcher import register_kernels

        from vllm_medusa.cpu_kernels.registry import FALLBACKS

        register_kernels(FALLBACKS)
    from cpu_cases import sampling, speculation, step

    results = {}
    for module in (step, sampling, speculation):
        for name, case in module.CASES.items():
            rng = np.random.default_rng(zlib.crc32(name.encode()))
            try:
                results[name] = case(rng)
            except Exception as e:
                import traceback

                print("FAIL", name, repr(e)[:300])
                traceback.print_exc()
    torch.save(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
