"""README's table of what is supported: every row has a test or a refusal, and both are real."""

from __future__ import annotations

import ast
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_medusa.compatibility import REFUSAL_TEST, REFUSALS, SUPPORTED, check_config

ROOT = Path(__file__).resolve().parents[2]


def plain_config() -> SimpleNamespace:
    """The fields of a vLLM config that the refusals read, with nothing switched on."""
    return SimpleNamespace(
        use_v2_model_runner=True,
        kv_transfer_config=None,
        model_config=SimpleNamespace(
            is_hybrid=False,
            is_attention_free=False,
            use_mla=False,
            is_encoder_decoder=False,
            runner_type="generate",
            is_mm_prefix_lm=False,
            hf_text_config=SimpleNamespace(),
            rswa_window=None,
            return_sampling_mask=False,
        ),
        parallel_config=SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
            enable_batch_sharded_sampling=False,
            pipeline_parallel_size=1,
        ),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False, cache_dtype="auto"),
        scheduler_config=SimpleNamespace(async_scheduling=False),
    )


def connector(name: str) -> SimpleNamespace:
    """A KV transfer configuration."""
    return SimpleNamespace(kv_connector=name)


# feature -> dotted fields, and the values that switch it on
SWITCHES = {
    "the V1 model runner": {"use_v2_model_runner": False},
    "recurrent layers (Mamba, gated delta nets)": {"model_config.is_hybrid": True},
    "multi-head latent attention (MLA)": {"model_config.use_mla": True},
    "encoder-decoder models": {"model_config.is_encoder_decoder": True},
    "pooling models": {"model_config.runner_type": "pooling"},
    "prefix-LM masks": {"model_config.is_mm_prefix_lm": True},
    "chunked local attention (Llama 4)": {"model_config.hf_text_config.attention_chunk_size": 8},
    "reference sliding windows": {"model_config.rswa_window": 8},
    "KV connectors other than OffloadingConnector": {"kv_transfer_config": connector("Nixl")},
    "KV offloading with pipeline parallelism": {
        "kv_transfer_config": connector("OffloadingConnector"),
        "parallel_config.pipeline_parallel_size": 2,
    },
    "decode context parallelism": {"parallel_config.decode_context_parallel_size": 2},
    "prefill context parallelism": {"parallel_config.prefill_context_parallel_size": 2},
    "dual batch overlap": {"parallel_config.use_ubatching": True},
    "batch-sharded sampling": {"parallel_config.enable_batch_sharded_sampling": True},
    "KV-sharing fast prefill": {"cache_config.kv_sharing_fast_prefill": True},
    "a quantised KV cache other than fp8_e4m3 on a GPU": {"cache_config.cache_dtype": "fp8_e5m2"},
    "pipeline parallelism without async scheduling": {"parallel_config.pipeline_parallel_size": 2},
    "return_sampling_mask": {"model_config.return_sampling_mask": True},
}


def test_nothing_is_refused_without_a_reason():
    config = plain_config()
    check_config(config)
    config.kv_transfer_config = connector("OffloadingConnector")
    check_config(config)


def test_the_feature_is_named_before_the_runner_that_vllm_falls_back_to():
    config = plain_config()
    config.parallel_config.use_ubatching, config.use_v2_model_runner = True, False
    with pytest.raises(ValueError, match="dual batch overlap"):
        check_config(config)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.feature)
def test_refusal(refusal):
    config = plain_config()
    for path, value in SWITCHES[refusal.feature].items():
        *owners, field = path.split(".")
        owner = config
        for name in owners:
            owner = getattr(owner, name)
        setattr(owner, field, value)
    with pytest.raises(ValueError, match=re.escape(refusal.feature)) as caught:
        check_config(config)
    assert str(caught.value).endswith(refusal.reason)
    assert "\n" not in refusal.reason


@pytest.mark.vllm
@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3"])
def test_float8_caches_need_a_gpu(dtype, monkeypatch):
    import vllm.platforms

    config = plain_config()
    config.cache_config.cache_dtype = dtype
    for is_cuda in (True, False):
        platform = SimpleNamespace(is_cuda=lambda found=is_cuda: found)
        monkeypatch.setattr(vllm.platforms, "current_platform", platform)
        if is_cuda:
            check_config(config)
            continue
        with pytest.raises(ValueError, match="quantised KV cache"):
            check_config(config)


def test_every_switch_is_a_refusal():
    assert set(SWITCHES) == {refusal.feature for refusal in REFUSALS}


def test_features_are_listed_once():
    names = [row.feature for row in (*SUPPORTED, *REFUSALS)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("test", sorted({row.test for row in SUPPORTED} | {REFUSAL_TEST}))
def test_every_row_names_a_test_that_exists(test):
    file, _, name = test.partition("::")
    function, _, parameter = name.partition("[")
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in functions, f"{file} has no {function}"
    if parameter:
        # Parameters are named in the test's own file or, for models, in families.py.
        sources = [ROOT / file, ROOT / "tests/integration/families.py"]
        words = {
            node.value
            for source in sources
            for node in ast.walk(ast.parse(source.read_text()))
            if isinstance(node, ast.Constant)
        }
        assert parameter.rstrip("]") in words, f"{file}: {function} has no case {parameter}"


def test_readme_holds_the_current_table():
    section = runpy.run_path(str(ROOT / "benchmarks/report.py"))["refusals_section"]()
    readme = (ROOT / "README.md").read_text()
    assert section in readme, "README.md is out of date: run python benchmarks/report.py"
