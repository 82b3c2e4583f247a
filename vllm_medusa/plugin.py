"""Entry points of ``vllm.general_plugins`` and ``vllm.platform_plugins``.

Both are called in every vLLM process; neither changes anything until a config
asks for ``method="medusa"``.
"""

from __future__ import annotations

import logging

logger = logging.getLogger("vllm.vllm_medusa")


def register() -> None:
    """Install the Medusa method, or say in one sentence why it steps aside."""
    from vllm_medusa import __version__, vllm_seams

    if not vllm_seams.is_supported():
        missing = vllm_seams.missing_symbols()
        changed = f" (changed there: {', '.join(missing)})" if missing else ""
        logger.warning(
            "vllm-medusa %s is made for vLLM %s and steps aside on vLLM %s%s",
            __version__,
            vllm_seams.SUPPORTED_VLLM,
            vllm_seams.vllm_version(),
            changed,
        )
        return
    from vllm_medusa import cluster_seams, front_end
    from vllm_medusa.ray_nodes import check_nodes
    from vllm_medusa.request_options import RequestOptions
    from vllm_medusa.speculative_config import is_medusa

    vllm_seams.install_keyword(front_end.merge_speculative_model)
    vllm_seams.install_front_end(front_end)
    vllm_seams.install_config_gates(is_medusa)
    vllm_seams.install_request_gate(is_medusa, RequestOptions.of)
    cluster_seams.after_ray_placement(check_nodes)


def before_engine_args() -> None:
    """Prepare ``LLM(speculative_model=...)``; returns no platform, so vLLM picks its own.

    Called while vLLM is half imported: nothing here may import more of it.  An engine's front end
    is prepared here too: Ray Serve makes its config in another process, and vLLM loads no general
    plugin where it makes none.
    """
    from vllm_medusa import vllm_seams
    from vllm_medusa.import_watch import after_import

    def merge(speculative_config: dict | None, value: str) -> dict:
        from vllm_medusa.front_end import merge_speculative_model

        return merge_speculative_model(speculative_config, value)

    if vllm_seams.is_supported():
        vllm_seams.install_keyword(merge)
        after_import("vllm.v1.engine.async_llm", lambda module: register())
