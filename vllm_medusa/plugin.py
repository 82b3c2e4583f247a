"""Entry point of ``vllm.general_plugins``: called in every vLLM process.

Registering changes nothing until a config asks for ``method="medusa"``.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.vllm_medusa")


def register() -> None:
    """Install the Medusa method, or say in one sentence why it steps aside."""
    from vllm_medusa import __version__, vllm_seams

    version = vllm_seams.vllm_version()
    if version.split("+")[0].rsplit(".", 1)[0] != vllm_seams.SUPPORTED_VLLM:
        missing = vllm_seams.missing_symbols()
        changed = f" (changed there: {', '.join(missing)})" if missing else ""
        logger.warning(
            "vllm-medusa %s is made for vLLM %s and steps aside on vLLM %s%s",
            __version__,
            vllm_seams.SUPPORTED_VLLM,
            version,
            changed,
        )
        return
    from vllm_medusa import front_end
    from vllm_medusa.speculative_config import is_medusa

    vllm_seams.install_front_end(front_end)
    vllm_seams.install_config_gates(is_medusa)
