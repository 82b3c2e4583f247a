"""What a cell of compare.py is measured at: requests in flight and temperature."""

from __future__ import annotations

from typing import Any, NamedTuple


class Case(NamedTuple):
    """Requests in flight and temperature."""

    concurrency: int
    temperature: float = 0.0

    def key(self, side: str) -> dict[str, Any]:
        """Of its cell; greedy ones name no temperature, as those of records before there was one.

        Examples
        --------
        >>> Case(8).key("tree"), Case(1, 0.7).key("tree")["temperature"]
        ({'side': 'tree', 'concurrency': 8}, 0.7)
        """
        heat = {"temperature": self.temperature} if self.temperature else {}
        return {"side": side, "concurrency": self.concurrency} | heat

    def __str__(self) -> str:
        heat = f", temperature {self.temperature:g}" if self.temperature else ""
        return f"{self.concurrency} at once{heat}"


def case_of(cell: dict[str, Any]) -> Case:
    """What a cell was measured at."""
    return Case(cell["key"]["concurrency"], cell["key"].get("temperature", 0.0))
