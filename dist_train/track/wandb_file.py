"""What of a run lies in W&B's own file, for which it has no reader in Python; a step in two files it uploads twice.

The file is a log of LevelDB's: after 7 bytes of W&B's own, blocks of 32 KiB of fragments: a checksum (4 bytes), the
length (2), whether it is all of a record, its first, a middle or its last fragment (1), and the data. A record is a
protobuf.
"""

import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK = 1 << 15
HEADER = struct.Struct("<IHB")
WHOLE, FIRST, _, LAST = 1, 2, 3, 4


def last_step(file: Path) -> int | None:
    """The last step with metrics, 0 if there is none; None if there is no record at all. What a kill has cut off is not
    there."""
    from wandb.proto.wandb_internal_pb2 import Record

    last = None
    for data in _records(file.read_bytes()):
        last = last or 0
        record = Record.FromString(data)
        if record.HasField("history"):
            last = max(last, record.history.step.num)
    return last


def _records(content: bytes) -> Iterator[bytes]:
    at, record = HEADER.size, b""  # its own 7 bytes first
    while at + HEADER.size <= len(content):
        if BLOCK - at % BLOCK < HEADER.size:  # no fragment begins so near to a block's end
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, at)
        at += HEADER.size
        if kind not in range(WHOLE, LAST + 1) or at + length > len(content):
            return
        record = content[at : at + length] if kind in (WHOLE, FIRST) else record + content[at : at + length]
        at += length
        if kind in (WHOLE, LAST):
            yield record
