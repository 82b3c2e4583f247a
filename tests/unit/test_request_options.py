"""What a request may ask of Medusa: read, defaulted, or refused in one sentence."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from vllm_medusa.config import MedusaOptions
from vllm_medusa.request_options import RequestOptions

SERVER = SimpleNamespace(acceptance="exact", typical_epsilon=0.09, typical_delta=0.3)
TYPICAL_SERVER = SimpleNamespace(acceptance="typical", typical_epsilon=0.2, typical_delta=0.5)


@pytest.mark.parametrize(
    "extra_args, server, expected",
    [
        (None, SERVER, (None, "exact", 0.09, 0.3)),
        ({"top_n_sigma": 2, "session_id": "a"}, SERVER, (None, "exact", 0.09, 0.3)),
        ({"medusa_nodes": 0}, SERVER, (0, "exact", 0.09, 0.3)),
        ({"medusa_acceptance": "typical"}, SERVER, (None, "typical", 0.09, 0.3)),
        ({}, TYPICAL_SERVER, (None, "typical", 0.2, 0.5)),
        ({"medusa_acceptance": "exact"}, TYPICAL_SERVER, (None, "exact", 0.2, 0.5)),
        ({"medusa_typical_epsilon": 0.36}, TYPICAL_SERVER, (None, "typical", 0.36, 0.6)),
        (
            {"medusa_acceptance": "typical", "medusa_typical_delta": 1, "medusa_nodes": 63},
            SERVER,
            (63, "typical", 0.09, 1.0),
        ),
    ],
)
def test_read(extra_args, server, expected):
    options = RequestOptions.of(extra_args, server)
    found = (
        options.nodes, options.acceptance, options.typical_epsilon, options.typical_delta
    )  # fmt: skip
    assert found == expected
    assert options.typical == (expected[1] == "typical")


@pytest.mark.parametrize(
    "extra_args, words",
    [
        ({"medusa_node": 1}, ["'medusa_node'", "medusa_nodes"]),
        ({"medusa_nodes": -1}, ["medusa_nodes=-1", "0 (no speculation) to 127"]),
        ({"medusa_nodes": 128}, ["medusa_nodes=128"]),
        ({"medusa_nodes": 2.0}, ["medusa_nodes=2.0", "integer"]),
        ({"medusa_nodes": True}, ["medusa_nodes=True"]),
        ({"medusa_nodes": "off"}, ["medusa_nodes='off'"]),
        ({"medusa_acceptance": "fast"}, ["medusa_acceptance='fast'", "exact, typical"]),
        ({"medusa_acceptance": ["typical"]}, ["medusa_acceptance=['typical']"]),
        ({"medusa_typical_epsilon": 0.2}, ["medusa_typical_epsilon=0.2", "'typical'"]),
        (
            {"medusa_acceptance": "typical", "medusa_typical_epsilon": 1.5},
            ["medusa_typical_epsilon=1.5", "at most 1"],
        ),
        (
            {"medusa_acceptance": "typical", "medusa_typical_delta": math.nan},
            ["medusa_typical_delta=nan", "above 0"],
        ),
        (
            {"medusa_acceptance": "typical", "medusa_typical_delta": "0.3"},
            ["medusa_typical_delta='0.3'", "number"],
        ),
    ],
)
def test_refused(extra_args, words):
    with pytest.raises(ValueError) as caught:
        RequestOptions.of(extra_args, SERVER)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_the_server_s_own_rule():
    options = MedusaOptions.from_speculative_config(
        {"model": "heads", "acceptance": "typical", "typical-epsilon": 0.16}
    )
    assert (options.acceptance, options.typical_epsilon, options.typical_delta) == (
        "typical", 0.16, None
    )  # fmt: skip
    for key, value in (("acceptance", "quick"), ("typical_epsilon", 0), ("typical_delta", True)):
        with pytest.raises(ValueError, match=f"medusa: {key}={value!r}"):
            MedusaOptions.from_speculative_config({"model": "heads", key: value})
