"""Pickles in the place of heads: honest, odd, damaged, and ones that run code when loaded."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import Any

import torch

PICKLE_KINDS = (
    "plain", "odd", "code", "legacy", "legacy code", "compressed", "sizes", "opcodes",
)  # fmt: skip


class Bomb:
    """Creates a file when unpickled by a loader that executes what it reads."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return (os.mkdir, (str(self.trace),))


def pickle_bytes(rng: Random, tensors: dict, trace: Path) -> tuple[bytes, str]:
    """A ``.pt`` file: plain, nested, of other objects, with code, legacy, compressed."""
    bomb = Bomb(trace)
    key = next(iter(tensors), "x")
    odd = (
        [torch.ones(2)], {"state_dict": tensors}, {**tensors, 3: torch.ones(2)}, {None: 1},
        {(1, 2): torch.ones(1)}, {**tensors, key: 3}, "text", 7, None, torch.ones(3),
        {**tensors, key: torch.ones(4, 4).to_sparse()}, {**tensors, key: torch.ones(4, 4).T},
        {**tensors, key: torch.empty(4, 4, device="meta")},
        {**tensors, key: torch.nn.Parameter(torch.ones(4, 4))},
        {**tensors, key: torch.ones(1, 1).expand(4, 4)},
        {**tensors, key: torch.ones(1, 1).expand(2**31, 4)}, {key: tensors.get(key)},
    )  # fmt: skip
    kind = rng.choice(PICKLE_KINDS)
    content: Any = rng.choice(odd) if kind == "odd" else tensors
    if "code" in kind:
        content = rng.choice((bomb, {**tensors, key: bomb}, [bomb], {"x": [bomb]}))
    if kind == "legacy code" and rng.choice((True, False)):
        return pickle.dumps(content, protocol=rng.choice((0, 2, 4))), "raw pickle"
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization="legacy" not in kind)
    if kind == "compressed":
        method = rng.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED))
        return _rezip(buffer.getvalue(), method), kind
    if kind == "sizes":
        return _lie_about_sizes(rng, buffer.getvalue()), kind
    if kind == "opcodes":
        program = rng.choice((*live_programs(str(trace).encode()), *OTHER_PROGRAMS))
        return _rezip(buffer.getvalue(), zipfile.ZIP_STORED, program), kind
    return buffer.getvalue(), kind


def live_programs(trace: bytes) -> tuple[bytes, ...]:
    """Pickles that create ``trace`` when loaded, one for each opcode that calls something."""
    text = b"X" + struct.pack("<I", len(trace)) + trace
    return (
        b"cposix\nmkdir\n(" + text + b"tR.",
        b"\x80\x04\x8c\x05posix\x8c\x05mkdir\x93" + text + b"\x85R.",
        b"(" + text + b"iposix\nmkdir\n.",
        b"(cposix\nmkdir\n" + text + b"o.",
        b"cbuiltins\neval\n(S'__import__(\"os\").mkdir(\"" + trace + b"\")'\ntR.",
    )


HUGE_SIZE = struct.pack("<Q", 2**62)
# What no pickler writes: states and globals that are not for sale, sizes without end.
OTHER_PROGRAMS = (
    b"\x80\x02cposix\nmkdir\nX\x01\x00\x00\x00x\x85\x81.",
    b"ccollections\nOrderedDict\n)R}(S'__reduce__'\ncposix\nmkdir\nub.",
    b"ctorch\nTensor\n)R}(S'__setstate__'\ncposix\nmkdir\nub.",
    b"ctorch.hub\nload\n(S'x'\ntR.",
    b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x01K\x01K\x01tR.",
    b"ctorch\n_utils\n.", b"cos\n.", b"c\n\n.", b"P1\n.", b"K\x01Q.", b"\x82\x01.",
    b"\x80\x04\x8d" + HUGE_SIZE + b"a.", b"\x8e" + HUGE_SIZE + b".",
    b"\x96" + HUGE_SIZE + b".", b"\x8b\xff\xff\xff\x7f.", b"X\xff\xff\xff\xffa.",
    b"j\xff\xff\xff\xff.", b"(" * 50_000 + b".", b"]" * 1000 + b"a" * 999 + b".",
    b"(" + b"t(" * 5000 + b"t.", b"\x80\xff.", b"0.", b"a.", b"", b".",
    b"I" + b"9" * 5000 + b"\n.", b"Fnan\n.",
)  # fmt: skip


def _rezip(content: bytes, method: int, program: bytes | None = None) -> bytes:
    """The same archive, written by another program; perhaps with another pickle in it."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(target, "w", method) as new:
        for info in old.infolist():
            record = old.read(info)
            if program is not None and info.filename.endswith("/data.pkl"):
                record = program
            new.writestr(info.filename, record)
    return target.getvalue()


def _lie_about_sizes(rng: Random, content: bytes) -> bytes:
    """Change small integers of the pickle, among them sizes, strides and storage lengths."""
    start = content.find(b"\x80\x02")
    place = content.find(b"K", start + rng.randrange(1, 300))
    if start < 0 or place < 0:
        return content
    small = bytes([rng.choice((0, 1, 255, 127, 16))])
    return content[: place + 1] + small + content[place + 2 :]
