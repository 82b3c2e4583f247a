"""The sampler's noise in drafts: its bits, and that drafts with it are what would be drawn."""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from vllm_medusa.cpu_kernels import murmur3
from vllm_medusa.cpu_kernels.gumbel import gumbel_argmax
from vllm_medusa.triton_kernels import draft_tree, noise, reference, top_tokens
from vllm_medusa.triton_kernels.draft_workspace import GROUP
from vllm_medusa.triton_kernels.noise_types import DrawNoise
from vllm_medusa.triton_kernels.reference_noise import gumbel_noise, noise_hash

CHUNK = 32 * GROUP
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF]
POSITIONS = [0, 1, 77, 2**20]


def check_noise(values, want):
    """The kernel's series is within 6e-7 of the logarithm; noise below -0.8 comes from u above
    0.9, of which float32 knows less and less, and is hardly ever that of a drawn token."""
    decides = want > -0.8
    torch.testing.assert_close(values[decides], want[decides], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(values[~decides], want[~decides], rtol=0, atol=0.1)


def hashes_and_noise(seed, position, num_ids, device):
    """Of the first ids, by the kernels' own functions."""

    # Here, because the interpreter is on while tests run, not when they are collected.
    @triton.jit
    def kernel(hashes, values, seed, position, num_ids, BLOCK: tl.constexpr):
        ids = tl.arange(0, BLOCK)
        found = noise.token_hash(noise.row_hash(tl.load(seed), tl.load(position)), ids)
        tl.store(hashes + ids, found.to(tl.int64), mask=ids < num_ids)
        tl.store(values + ids, noise.gumbel_noise(found), mask=ids < num_ids)

    hashes = torch.zeros(num_ids, dtype=torch.int64, device=device)
    values = torch.zeros(num_ids, device=device)
    keys = [torch.tensor([key], device=device) for key in (seed, position)]
    kernel[(1,)](hashes, values, *keys, num_ids, BLOCK=triton.next_power_of_2(num_ids))
    return hashes.cpu(), values.cpu()


def draw_noise(seeds, temperatures, lengths, device="cpu", slots=None, **options):
    """Of requests in slots 0, 1, ..; the first head's nodes lie one below the root."""
    slots = list(range(len(seeds))) if slots is None else slots
    options = {"depth": 1, "depth_step": 1, "spread": 1.0} | options
    return DrawNoise(
        torch.tensor(seeds, device=device),
        torch.tensor(temperatures, dtype=torch.float32, device=device),
        torch.tensor(lengths, dtype=torch.int32, device=device),
        torch.tensor(slots, device=device), **options,
    )  # fmt: skip


def moved(noise, device):
    return DrawNoise(*(part.to(device) for part in noise[:4]), *noise[4:])


def drafted(launcher, logits, noise, device, num_top=1, token_map=None):
    """Tokens [R, K, num_top] of draft_tree."""
    num_reqs, num_heads, _ = logits.shape
    columns = torch.arange(num_heads * num_top, device=device)
    out = torch.empty(num_reqs, len(columns), dtype=torch.int64, device=device)
    launcher(
        out, logits.to(device), columns, num_top=num_top, noise=moved(noise, device),
        token_map=None if token_map is None else token_map.to(device),
    )  # fmt: skip
    return out.view(num_reqs, num_heads, num_top).cpu()


def scored(launcher, logits, noise, device, num_top=4, token_map=None):
    """Tokens and log probabilities of top_tokens."""
    shape = (*logits.shape[:2], num_top)
    tokens = torch.empty(shape, dtype=torch.int64, device=device)
    log_probs = torch.empty(shape, device=device)
    launcher(
        tokens, log_probs, logits.to(device), noise=moved(noise, device),
        token_map=None if token_map is None else token_map.to(device),
    )  # fmt: skip
    return tokens.cpu(), log_probs.cpu()


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("seed", SEEDS)
def test_hashes_are_the_sampler_s(device, seed, position):
    ids = 1000
    hashes, values = hashes_and_noise(seed, position, ids, device)
    rows = murmur3.row_hashes(np.array([seed]), np.array([position]))
    want = murmur3.token_hashes(rows, murmur3.scrambled_token_ids(ids)).astype(np.int64)
    assert hashes.tolist() == want.tolist()
    twin = [torch.tensor([seed]), torch.tensor([position]), torch.arange(ids)]
    assert noise_hash(*twin).tolist() == want.tolist()
    check_noise(values, gumbel_noise(*twin))


def test_noise_of_every_size(device):
    """u from the smallest to the largest, around 1 / 4, where the series ends."""
    hashes = torch.tensor([0, 1, 2**16, 2**24, 2**30 - 1, 2**30, 2**31, 2**32 - 2, 2**32 - 1])

    @triton.jit
    def kernel(values, hashes, num, BLOCK: tl.constexpr):
        ids = tl.arange(0, BLOCK)
        found = tl.load(hashes + ids, mask=ids < num, other=0).to(tl.uint32)
        tl.store(values + ids, noise.gumbel_noise(found), mask=ids < num)

    values = torch.zeros(len(hashes), device=device)
    kernel[(1,)](values, hashes.to(device), len(hashes), BLOCK=16)
    u = (hashes.double() + 0.5) * 2.0**-32
    want = -(-torch.log1p(-u)).log()
    # float32 knows no u between 1 - 6e-8 and 1: the least noise, which nothing is drawn by.
    check_noise(values.cpu()[:-2], want.float()[:-2])
    assert (values[-2:] < -2.5).all()
    assert values.isfinite().all()


@pytest.mark.parametrize("launcher", [draft_tree, reference.draft_tree])
@pytest.mark.parametrize("vocab", [5, GROUP, CHUNK + 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_that_is_right_drafts_what_is_drawn(device, launcher, vocab, dtype):
    """Its logits are the target's: the best token of each head is the sampler's at that depth."""
    place = device if launcher is draft_tree else "cpu"
    seeds, temperatures, lengths = [7, -5, 12, 3], [0.7, 1.0, 0.0, 1.9], [9, 30, 4, 1]
    logits = (torch.randn(4, 3, vocab) * 2).to(dtype)
    got = drafted(launcher, logits, draw_noise(seeds, temperatures, lengths), place)[..., 0]
    for head in range(3):
        # A node of depth head + 1 is drawn at its parent's row; the root is token `length - 1`.
        positions = np.array(lengths) - 1 + head
        _, want = gumbel_argmax(
            logits[:, head].float().numpy(), np.array(temperatures, np.float32), np.array(seeds),
            positions, apply_temperature=True, use_fp64=False,
        )  # fmt: skip
        assert got[:, head].tolist() == want.tolist()


@pytest.mark.parametrize("vocab", [GROUP - 1, GROUP + 1, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_their_twins(device, vocab, dtype):
    logits = (torch.randn(3, 2, vocab) * 3).to(dtype)
    noise = draw_noise([1, 2, 3], [0.7, 0.0, 1.3], [5, 6, 7], spread=1.5)
    assert torch.equal(
        drafted(draft_tree, logits, noise, device, 9),
        drafted(reference.draft_tree, logits, noise, "cpu", 9),
    )
    tokens, log_probs = scored(top_tokens, logits, noise, device, 9)
    twin_tokens, twin_log_probs = scored(reference.top_tokens, logits, noise, "cpu", 9)
    assert torch.equal(tokens, twin_tokens)
    # Sums of float32, each with the noise's own error.
    torch.testing.assert_close(log_probs, twin_log_probs, rtol=1e-5, atol=1e-5)
    assert torch.equal(tokens, drafted(draft_tree, logits, noise, device, 9))


def test_log_probabilities_are_those_of_the_spread_sum(device):
    logits = torch.randn(1, 2, 700) * 3
    noise = draw_noise([4], [0.5], [20], spread=1.75)
    tokens, log_probs = scored(top_tokens, logits, noise, device)
    positions = torch.tensor([[19], [20]])
    noisy = logits[0] / 0.5 + gumbel_noise(torch.tensor([[4]]), positions, torch.arange(700)[None])
    want = (noisy.double() / 1.75).log_softmax(-1).sort(-1, descending=True)
    assert torch.equal(tokens[0], want.indices[:, :4])
    torch.testing.assert_close(log_probs[0].double(), want.values[:, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("temperatures", "slots"),
    [([0.0, 0.0], [0, 1]), ([0.9, 0.9], [-1, -1])],
    ids=["greedy", "padding"],
)
def test_without_temperature_nothing_changes(device, temperatures, slots):
    """To the bit, spread or not: greedy requests, and padding, which is no request."""
    logits = torch.randn(2, 2, 600)
    noise = draw_noise([3, 4], temperatures, [8, 9], slots=slots, spread=2.0)
    plain_tokens = torch.empty(2, 2, 4, dtype=torch.int64, device=device)
    plain_log_probs = torch.empty(2, 2, 4, device=device)
    top_tokens(plain_tokens, plain_log_probs, logits.to(device))
    tokens, log_probs = scored(top_tokens, logits, noise, device)
    assert torch.equal(tokens, plain_tokens.cpu())
    assert torch.equal(log_probs, plain_log_probs.cpu())
    assert torch.equal(drafted(draft_tree, logits, noise, device, 4), tokens)


def test_requests_are_found_by_slot(device):
    logits = torch.randn(3, 1, 300)
    apart = draw_noise([1, 2, 3], [0.5, 0.0, 1.5], [11, 12, 13])
    mixed = draw_noise([3, 9, 1, 2], [1.5, 9.0, 0.5, 0.0], [13, 99, 11, 12], slots=[2, 3, 0])
    assert torch.equal(
        drafted(draft_tree, logits, mixed, device, 5), drafted(draft_tree, logits, apart, device, 5)
    )


@pytest.mark.parametrize("rows", [1, 2])
def test_noise_is_that_of_the_base_vocabulary_s_ids(device, rows):
    """Heads that score every third token: the noise of these, not of their places."""
    vocab, num_heads = 400, 2
    ids = torch.stack([torch.arange(head, 3 * vocab, 3) for head in range(rows)])
    logits = torch.randn(1, num_heads, vocab)
    noise = draw_noise([6], [1.0], [40])
    wide = torch.full((1, num_heads, 3 * vocab), float("-inf"))
    for head in range(num_heads):
        wide[0, head, ids[head % rows]] = logits[0, head]
    want = drafted(reference.draft_tree, wide, noise, "cpu", 6)
    for launcher, place in ((draft_tree, device), (reference.draft_tree, "cpu")):
        assert torch.equal(drafted(launcher, logits, noise, place, 6, ids), want)
    assert torch.equal(scored(top_tokens, logits, noise, device, 6, ids)[0], want)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_rows_of_one_depth_share_their_noise(device, depth):
    """Parents of one depth, as sequential heads draft them: equal logits, equal tokens."""
    logits = torch.randn(1, 1, 500).expand(1, 4, 500)
    level = draw_noise([5], [1.0], [9], depth=depth, depth_step=0)
    flat = drafted(draft_tree, logits, level, device, 3)
    assert (flat == flat[:, :1]).all()
    deeper = draw_noise([5], [1.0], [9 + depth - 1])
    assert torch.equal(flat[:, 0], drafted(draft_tree, logits, deeper, device, 3)[:, 0])
    assert not torch.equal(flat[:, 1], drafted(draft_tree, logits, deeper, device, 3)[:, 1])


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_tokens_that_cannot_be_drawn_come_last(device, value):
    """Whatever their noise."""
    logits = torch.full((1, 1, 300), value)
    logits[0, 0, [4, 250]] = torch.tensor([-50.0, 60.0])
    noise = draw_noise([8], [1.0], [3])
    for launcher, place in ((draft_tree, device), (reference.draft_tree, "cpu")):
        assert drafted(launcher, logits, noise, place, 2).flatten().tolist() == [250, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": torch.zeros(2, dtype=torch.int32)}, "noise.seeds"),
        ({"temperatures": torch.zeros(3)}, "noise.temperatures"),
        ({"lengths": torch.zeros(2, dtype=torch.int64)}, "noise.lengths"),
        ({"slots": torch.zeros(1, dtype=torch.int64)}, "noise.slots"),
        ({"slots": torch.zeros(4, dtype=torch.int64)[::2]}, "noise.slots"),
        ({"depth": 0}, "noise.depth"),
        ({"depth_step": 2}, "noise.depth_step"),
        ({"spread": 0.0}, "noise.spread"),
    ],
)
def test_refused(change, message):
    noise = draw_noise([1, 2], [0.5, 0.5], [3, 4])._replace(**change)
    logits = torch.zeros(2, 1, 9)
    for call in (drafted, scored):
        launcher = reference.draft_tree if call is drafted else reference.top_tokens
        with pytest.raises(ValueError, match=message):
            call(launcher, logits, noise, "cpu", 2)
