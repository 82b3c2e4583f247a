"""Tokens per step and acceptance by depth, read from a server's metrics."""

import urllib.request
from dataclasses import dataclass

DRAFTS = "vllm:spec_decode_num_drafts"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens"
ACCEPTED_AT = "vllm:spec_decode_num_accepted_tokens_per_pos"


@dataclass(frozen=True)
class Acceptance:
    """Counts since a server started, or between two moments.

    One step is one pass of the base model over a draft; it yields the accepted
    draft tokens and one more that the model adds itself.
    """

    steps: int
    accepted: int
    accepted_at: tuple[int, ...]  # depth - 1 -> steps that accepted at least that deep

    @property
    def tokens_per_step(self) -> float:
        """Tokens that one pass of the base model yields on average."""
        return 1 + self.accepted / self.steps if self.steps else 1.0

    @property
    def rate_by_depth(self) -> tuple[float, ...]:
        """Share of the steps whose accepted path reaches depth 1, 2, ...

        Depths that no step ever reached at the end of the list are left out.
        """
        if not self.steps:
            return ()
        deepest = max((d for d, n in enumerate(self.accepted_at, 1) if n), default=0)
        return tuple(count / self.steps for count in self.accepted_at[:deepest])

    def since(self, earlier: "Acceptance") -> "Acceptance":
        """Return the counts between ``earlier`` and this moment.

        Examples
        --------
        >>> Acceptance(9, 8, (5, 3)).since(Acceptance(4, 2, (2, 0)))
        Acceptance(steps=5, accepted=6, accepted_at=(3, 3))
        """
        before = earlier.accepted_at + (0,) * (len(self.accepted_at) - len(earlier.accepted_at))
        depths = tuple(now - then for now, then in zip(self.accepted_at, before, strict=False))
        return Acceptance(self.steps - earlier.steps, self.accepted - earlier.accepted, depths)


def parse(text: str) -> Acceptance:
    """Read the counters from a metrics page; all zero on a server without speculation."""
    from prometheus_client.parser import text_string_to_metric_families

    steps = accepted = 0
    by_position: dict[int, int] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{DRAFTS}_total":
                steps += int(sample.value)
            elif sample.name == f"{ACCEPTED}_total":
                accepted += int(sample.value)
            elif sample.name == f"{ACCEPTED_AT}_total":
                position = int(sample.labels["position"])
                by_position[position] = by_position.get(position, 0) + int(sample.value)
    depths = tuple(by_position.get(p, 0) for p in range(max(by_position, default=-1) + 1))
    return Acceptance(steps, accepted, depths)


def read(url: str) -> Acceptance:
    """Read the counters of the server at ``url``."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        return parse(answer.read().decode())
