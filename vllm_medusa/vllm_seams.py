"""Every private vLLM name that this project relies on or replaces, and why.

Made for vLLM 0.32.  vLLM has official hooks for the worker, the scheduler, the
attention backend and CPU kernels; what follows has none. Names of its cluster and CPU
code are in ``cluster_seams.py`` and ``cpu_seams.py``.

==============================================  =====================================
name                                            why there is no other way
==============================================  =====================================
EngineArgs.__init__ / from_cli_args             the keyword and the flag that the user
EngineArgs.add_cli_args                         types, ``speculative_model`` and
                                                ``--speculative-model``
EngineArgs.create_speculative_config            always builds the base class, whose
                                                "medusa" is the V1 chain
EngineArgs.create_engine_config                 last place before VllmConfig picks the
                                                attention backend
VllmConfig._get_v2_model_runner_                lists "medusa" as V1-only by name
  unsupported_features
config.vllm.NgramGPUTypes                       names the methods that may be scheduled
                                                asynchronously
VllmConfig.use_v2_model_runner                  no V2 runner on a CPU without Triton's CPU
VllmConfig._validate_v2_model_runner            backend; our kernels replace what it needs
SamplingParams._validate_spec_decode            refuses min_p and logit_bias under any
                                                speculation, our rule is exact for both; and
                                                the place to refuse a request's own options
StructuredOutputManager._get_constraint_bounds  where a reasoning parser lets a grammar begin;
                                                asked along one chain only by vLLM itself
SpecDecodingProm.__init__                       one Prometheus label per draft token:
                                                63 nodes, but only `depth` positions
gpu.model_runner.init_speculator                a name imported by the runner's
                                                constructor; knows vLLM's methods only
CudaGraphManager._candidates, ._capture_descs   vLLM's modes know graphs of mixed batches or of
                                                uniform ones, not both
RequestState.all_token_ids                      in host memory unless the method is ngram;
                                                prompt lookup reads all of it at every step
DefaultModelState.prepare_inputs                computes M-RoPE positions behind the runner's
                                                last hook, along the batch row
Attention._q_scale, ._k_scale, ._v_scale        factors of a float8 cache; attention backends,
                                                ours among them, are given the layer for them
selector._cached_get_attn_backend               remembers the backend of an engine that ran
                                                earlier in this process
==============================================  =====================================
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal

from vllm_medusa.import_watch import after_import

SUPPORTED_VLLM = "0.32"

# (module, attribute path): what `missing_symbols` looks for on a vLLM of another version.
RELIED_ON = (
    ("vllm.engine.arg_utils", "EngineArgs.add_cli_args"),
    ("vllm.engine.arg_utils", "EngineArgs.from_cli_args"),
    ("vllm.engine.arg_utils", "EngineArgs.create_speculative_config"),
    ("vllm.engine.arg_utils", "EngineArgs.create_engine_config"),
    ("vllm.config.vllm", "VllmConfig._get_v2_model_runner_unsupported_features"),
    ("vllm.config.vllm", "NgramGPUTypes"),
    ("vllm.config.speculative", "SpeculativeConfig.use_ngram_gpu"),
    ("vllm.sampling_params", "SamplingParams._validate_spec_decode"),
    ("vllm.v1.spec_decode.metrics", "SpecDecodingProm"),
    ("vllm.v1.structured_output", "StructuredOutputManager._get_constraint_bounds"),
)


def vllm_version() -> str:
    """Version of the installed vLLM, whichever distribution carries it."""
    from vllm.version import __version__

    return __version__


def is_supported() -> bool:
    """Whether the installed vLLM is of the version that this project is made for."""
    return vllm_version().split("+")[0].rsplit(".", 1)[0] == SUPPORTED_VLLM


def missing_symbols() -> list[str]:
    """Names of :data:`RELIED_ON` that the installed vLLM lacks."""
    missing = []
    for module_name, path in RELIED_ON:
        try:
            target: Any = importlib.import_module(module_name)
            for part in path.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError):
            missing.append(f"{module_name}.{path}")
    return missing


def _wrap(owner: Any, name: str, make: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``make(original)`` once; static, class methods, properties too."""
    raw = owner.__dict__[name]
    kind = type(raw) if isinstance(raw, (staticmethod, classmethod, property)) else None
    original = getattr(raw, "__func__", None) or getattr(raw, "fget", None) or raw
    if getattr(original, "_vllm_medusa", False):
        return
    wrapper = functools.wraps(original)(make(original))
    wrapper._vllm_medusa = True
    setattr(owner, name, kind(wrapper) if kind else wrapper)


def install_front_end(hooks: Any) -> None:
    """Teach ``EngineArgs`` the flag, the keyword and the config class.

    Parameters
    ----------
    hooks : module
        Provides ``add_cli_args(parser)``, ``merge_speculative_model(speculative_config,
        value)``, ``is_medusa_request(engine_args)``, ``create_config(engine_args, target_model,
        target_parallel)``, ``prepare_other_engine()``, ``prepare_engine_args(engine_args)``
        and ``finish_config(vllm_config)``.
    """
    from vllm.engine.arg_utils import EngineArgs

    def make_add_cli_args(original: Callable) -> Callable:
        def add_cli_args(parser):
            parser = original(parser)
            hooks.add_cli_args(parser)
            return parser

        return add_cli_args

    def make_from_cli_args(original: Callable) -> Callable:
        def from_cli_args(cls, args):
            value = getattr(args, "speculative_model", None)
            if value is not None:
                args.speculative_config = hooks.merge_speculative_model(
                    getattr(args, "speculative_config", None), value
                )
                # The namespace is read again by some entry points (one per API process).
                args.speculative_model = None
            return original(cls, args)

        return from_cli_args

    def make_create_speculative_config(original: Callable) -> Callable:
        def create_speculative_config(self, target_model_config, target_parallel_config):
            if hooks.is_medusa_request(self):
                return hooks.create_config(self, target_model_config, target_parallel_config)
            return original(self, target_model_config, target_parallel_config)

        return create_speculative_config

    def make_create_engine_config(original: Callable) -> Callable:
        def create_engine_config(self, *args, **kwargs):
            if not hooks.is_medusa_request(self):
                hooks.prepare_other_engine()
                return original(self, *args, **kwargs)
            hooks.prepare_engine_args(self)
            vllm_config = original(self, *args, **kwargs)
            hooks.finish_config(vllm_config)
            return vllm_config

        return create_engine_config

    _wrap(EngineArgs, "add_cli_args", make_add_cli_args)
    _wrap(EngineArgs, "from_cli_args", make_from_cli_args)
    _wrap(EngineArgs, "create_speculative_config", make_create_speculative_config)
    _wrap(EngineArgs, "create_engine_config", make_create_engine_config)


def install_keyword(merge: Callable[[dict | None, str], dict]) -> None:
    """Let ``EngineArgs`` (and so ``LLM``) take ``speculative_model="medusa:PATH"``.

    vLLM loads general plugins *inside* the first ``EngineArgs.__init__``, too late
    for a keyword of that call; a platform plugin runs before ``arg_utils`` is
    imported, so the wrapper goes in right after that import.
    """

    def make_init(original: Callable) -> Callable:
        def init(self, *args, speculative_model: str | None = None, **kwargs):
            if speculative_model is not None:
                kwargs["speculative_config"] = merge(
                    kwargs.get("speculative_config"), speculative_model
                )
            original(self, *args, **kwargs)

        return init

    def wrap_both(module: Any) -> None:
        # Two dataclasses, two generated constructors.
        _wrap(module.EngineArgs, "__init__", make_init)
        _wrap(module.AsyncEngineArgs, "__init__", make_init)

    after_import("vllm.engine.arg_utils", wrap_both)


def install_config_gates(is_medusa: Callable[[Any], bool]) -> None:
    """Let ``method="medusa"`` through the gates that mean vLLM's own V1 proposer."""
    import vllm.config.vllm as vllm_config_module
    from vllm import envs
    from vllm.config import VllmConfig
    from vllm.v1.spec_decode.metrics import SpecDecodingProm

    def make_unsupported(original: Callable) -> Callable:
        def unsupported_features(self):
            unsupported = original(self)
            if is_medusa(self.speculative_config):
                unsupported = [f for f in unsupported if f != "speculative method 'medusa'"]
            return unsupported

        return unsupported_features

    def make_use_v2(original: Callable) -> Callable:
        def use_v2_model_runner(self):
            if needs_triton_stand_in(self, is_medusa):
                return envs.VLLM_USE_V2_MODEL_RUNNER is not False
            return original(self)

        return use_v2_model_runner

    def make_validate_v2(original: Callable) -> Callable:
        def validate_v2_model_runner(self):
            if not needs_triton_stand_in(self, is_medusa):
                return original(self)
            with replaced("vllm.config.vllm", "HAS_TRITON", True):
                return original(self)

        return validate_v2_model_runner

    def make_prom_init(original: Callable) -> Callable:
        def prom_init(self, speculative_config, *args, **kwargs):
            if is_medusa(speculative_config):
                depth = speculative_config.deepest_path
                speculative_config = SimpleNamespace(num_speculative_tokens=depth)
            original(self, speculative_config, *args, **kwargs)

        return prom_init

    _wrap(VllmConfig, "_get_v2_model_runner_unsupported_features", make_unsupported)
    _wrap(VllmConfig, "use_v2_model_runner", make_use_v2)
    _wrap(VllmConfig, "_validate_v2_model_runner", make_validate_v2)
    _wrap(SpecDecodingProm, "__init__", make_prom_init)
    # vLLM's own Medusa (V1 chain) cannot be reached with the plugin installed, so
    # adding the name changes nothing for any other method.
    vllm_config_module.NgramGPUTypes = Literal["ngram_gpu", "medusa"]


def install_request_gate(
    is_medusa: Callable[[Any], bool], check_request: Callable[[Any, Any], Any]
) -> None:
    """Admit sampling parameters for which our rule is exact; refuse a request's wrong options.

    Parameters
    ----------
    is_medusa : callable
        Speculative config -> whether it asks for Medusa.
    check_request : callable
        Called with a request's ``extra_args`` and the speculative config before the request
        is admitted; its ValueError becomes the client's.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.sampling_params import SamplingParams

    def make_validate(original: Callable) -> Callable:
        def validate_spec_decode(self, speculative_config):
            if not is_medusa(speculative_config):
                original(self, speculative_config)
                return
            try:
                check_request(self.extra_args, speculative_config)
            except ValueError as error:
                raise VLLMValidationError(str(error), parameter="extra_args") from None

        return validate_spec_decode

    _wrap(SamplingParams, "_validate_spec_decode", make_validate)


def constraint_bounds(manager: Any, request: Any, tokens: Sequence[int]) -> Any:
    """Bounds of a structured-output request's grammar among its next ``tokens``."""
    return manager._get_constraint_bounds(request, tokens)


def needs_triton_stand_in(vllm_config: Any, is_medusa: Callable[[Any], bool]) -> bool:
    """Whether this is Medusa on a CPU where vLLM found no usable Triton."""
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    return (
        current_platform.is_cpu() and not HAS_TRITON and is_medusa(vllm_config.speculative_config)
    )


def cache_scales(layer: Any) -> tuple[Any, Any, Any]:
    """Factors of an attention layer's queries, keys and values, float32, one or one a KV head."""
    return layer._q_scale, layer._k_scale, layer._v_scale


def after_prepare_inputs(model_state: Any, action: Callable[[dict, Any], None]) -> None:
    """Let ``action(inputs, input_batch)`` correct what this model state's inputs are."""
    original = model_state.prepare_inputs

    def prepare_inputs(input_batch, req_states):
        inputs = original(input_batch, req_states)
        action(inputs, input_batch)
        return inputs

    model_state.prepare_inputs = prepare_inputs


def keep_history_on_device(req_states: Any) -> None:
    """Hold the requests' tokens in device memory, before anything else knows where they are.

    ``max_num_seqs * max_model_len`` int32: 128 MiB for 256 requests of 128k tokens.  Over the
    host link, a search of 32k tokens of 64 requests would read 8 MB a step.
    """
    from vllm.v1.worker.gpu.buffer_utils import StagedWriteTensor

    held = req_states.all_token_ids
    req_states.all_token_ids = StagedWriteTensor(
        tuple(held.gpu.shape), dtype=held.dtype, device=req_states.device
    )


def add_full_graphs(manager: Any, descriptors: Sequence[Any]) -> None:
    """Let vLLM capture further FULL graphs, and take them before PIECEWISE ones.

    Parameters
    ----------
    manager : vllm.v1.worker.gpu.cudagraph_utils.ModelCudaGraphManager
        Before its capture.
    descriptors : sequence of BatchExecutionDescriptor
        A batch takes the first with enough tokens that fits, if no uniform graph does.
    """
    from vllm.config.compilation import CUDAGraphMode

    captured = manager._capture_descs.setdefault(CUDAGraphMode.FULL, [])
    captured.extend(descriptors)
    # Largest first, as vLLM has them: smaller ones find their memory in the pool.
    captured.sort(key=lambda descriptor: descriptor.num_tokens, reverse=True)
    most = max((descriptor.num_tokens for descriptor in descriptors), default=0)
    for case in manager.lora_capture_cases:
        of_case = [one for one in descriptors if one.num_active_loras == case]
        for num_tokens in range(most + 1):
            known = manager._candidates.setdefault((num_tokens, case), [])
            at = sum(one.cg_mode == CUDAGraphMode.FULL for one in known)
            known[at:at] = [one for one in of_case if one.num_tokens >= num_tokens]


def replace_full_graphs(manager: Any, descriptors: Sequence[Any]) -> None:
    """Let a manager capture these FULL graphs and no others; as :func:`add_full_graphs`."""
    manager._capture_descs.clear()
    manager._candidates.clear()
    add_full_graphs(manager, descriptors)


def forget_attention_choices() -> None:
    """Make vLLM look its attention backends up again; it caches them for the whole process."""
    from vllm.v1.attention import selector

    selector._cached_get_attn_backend.cache_clear()


@contextlib.contextmanager
def replaced(module_name: str, name: str, value: Any) -> Iterator[None]:
    """Replace a module's global for the duration of one constructor call."""
    module = importlib.import_module(module_name)
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def speculator_factory(factory: Callable) -> contextlib.AbstractContextManager:
    """While active, the V2 runner's constructor builds its speculator with ``factory``."""
    return replaced("vllm.v1.worker.gpu.model_runner", "init_speculator", factory)
