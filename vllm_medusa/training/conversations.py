"""ConversationSet: token ids of many conversations with their answer mask, in one file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file


@dataclass(frozen=True)
class ConversationSet:
    """Ragged conversations stored flat.

    Tokens of conversation ``i`` are ``token_ids[offsets[i]:offsets[i + 1]]``. The answer mask
    covers exactly what the model itself wrote: its answers with the closing end-of-turn token,
    never the prompt, the template or the user.
    """

    # [num_tokens] int32
    token_ids: np.ndarray
    # [num_tokens] bool
    answer_mask: np.ndarray
    # [num_conversations + 1] int64, conversation -> first token
    offsets: np.ndarray

    def __post_init__(self) -> None:
        if self.token_ids.shape != self.answer_mask.shape:
            raise ValueError(
                f"answer_mask has shape {self.answer_mask.shape}, token_ids {self.token_ids.shape};"
                " expected one flag a token"
            )
        if self.offsets[0] != 0 or self.offsets[-1] != len(self.token_ids):
            raise ValueError(
                f"offsets run from {self.offsets[0]} to {self.offsets[-1]}; expected 0 to "
                f"{len(self.token_ids)}, the number of tokens"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_answer_tokens(self) -> int:
        return int(self.answer_mask.sum())

    @classmethod
    def from_pairs(cls, pairs: Iterable[tuple[Sequence[int], Sequence[int]]]) -> "ConversationSet":
        """Build from ``(prompt_ids, answer_ids)`` pairs; only ``answer_ids`` are marked.

        >>> ConversationSet.from_pairs([([1, 2], [3]), ([4], [5, 6])]).offsets.tolist()
        [0, 3, 6]
        """
        ids: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        lengths = [0]
        for prompt_ids, answer_ids in pairs:
            ids += [np.asarray(prompt_ids, np.int32), np.asarray(answer_ids, np.int32)]
            masks += [np.zeros(len(prompt_ids), bool), np.ones(len(answer_ids), bool)]
            lengths.append(len(prompt_ids) + len(answer_ids))
        return cls(
            np.concatenate(ids) if ids else np.zeros(0, np.int32),
            np.concatenate(masks) if masks else np.zeros(0, bool),
            np.cumsum(lengths, dtype=np.int64),
        )

    def tokens(self, index: int) -> np.ndarray:
        """Token ids of one conversation, [length] int32."""
        return self.token_ids[self.offsets[index] : self.offsets[index + 1]]

    def mask(self, index: int) -> np.ndarray:
        """Answer mask of one conversation, [length] bool."""
        return self.answer_mask[self.offsets[index] : self.offsets[index + 1]]

    def select(self, indices: Sequence[int] | np.ndarray) -> "ConversationSet":
        """Conversations ``indices`` in that order."""
        lengths = np.diff(self.offsets)[indices]
        rows = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in indices]
        flat = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        return ConversationSet(
            self.token_ids[flat], self.answer_mask[flat], np.cumsum([0, *lengths], dtype=np.int64)
        )

    def up_to(self, length: int) -> tuple["ConversationSet", int]:
        """Conversations of at most ``length`` tokens, and how many are longer; not all may be."""
        fits = np.diff(self.offsets) <= length
        longer = int((~fits).sum())
        if not longer:
            return self, 0
        if longer == len(self):
            raise ValueError(
                f"all {len(self)} conversations are longer than {length} tokens; expected some "
                "that the model can read whole. Cut them into shorter ones"
            )
        return self.select(np.flatnonzero(fits)), longer

    def split(self, held_out: int, seed: int) -> tuple["ConversationSet", "ConversationSet"]:
        """Random split into ``(training, held_out)``.

        Conversations that share their prompt (a greedy and a sampled answer, say) stay on one
        side; ``held_out`` counts conversations and may be passed by the last such group.
        """
        if not 0 <= held_out < max(len(self), 1):
            raise ValueError(
                f"held_out is {held_out}; expected 0 to {len(self) - 1}, fewer than all "
                f"{len(self)} conversations"
            )
        groups: dict[bytes, list[int]] = {}
        for i in range(len(self)):
            mask = self.mask(i)
            first = int(mask.argmax()) if mask.any() else len(mask)
            groups.setdefault(self.tokens(i)[:first].tobytes(), []).append(i)
        members = list(groups.values())
        test: list[int] = []
        train: list[int] = []
        for group in np.random.default_rng(seed).permutation(len(members)):
            (test if len(test) < held_out else train).extend(members[group])
        return self.select(train), self.select(test)

    def save(self, path: str | Path, metadata: dict[str, str] | None = None) -> None:
        """Write one safetensors file; about 5 bytes a token."""
        tensors = {
            "token_ids": self.token_ids.astype(np.int32),
            "answer_mask": self.answer_mask.astype(np.uint8),
            "offsets": self.offsets.astype(np.int64),
        }
        save_file(tensors, str(path), metadata=metadata)

    @classmethod
    def load(cls, *paths: str | Path) -> "ConversationSet":
        """Read one or several files and join them in the given order."""
        parts = []
        for path in paths:
            with safe_open(str(path), framework="np") as file:
                missing = {"token_ids", "answer_mask", "offsets"} - set(file.keys())
                if missing:
                    raise ValueError(
                        f"{path} lacks {sorted(missing)}; expected a file of `vllm-medusa distill`"
                    )
                parts.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
        if not parts:
            raise ValueError("no conversation file given; expected at least one path")
        lengths = np.concatenate([np.diff(part["offsets"]) for part in parts])
        return cls(
            np.concatenate([part["token_ids"] for part in parts]),
            np.concatenate([part["answer_mask"] for part in parts]).astype(bool),
            np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        )
