"""Read a safetensors file with the standard library only.

python read.py FILE     # name, type, shape and sum of every array
"""

import json
import math
import struct
import sys
from typing import Any

CODES = {"F64": "d", "F32": "f", "I64": "q"}


def read(path: str) -> dict[str, Any]:
    """Return {name: (type, shape, numbers in C order)}."""
    with open(path, "rb") as file:
        content = file.read()
    (length,) = struct.unpack_from("<Q", content)
    header, found = json.loads(content[8 : 8 + length]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            kind, shape, start = entry["dtype"], entry["shape"], 8 + length + entry["data_offsets"][0]
            found[name] = kind, shape, struct.unpack_from(f"<{math.prod(shape)}{CODES[kind]}", content, start)
    return found


if __name__ == "__main__":
    for name, (kind, shape, numbers) in read(sys.argv[1]).items():
        total = 0.0
        for number in numbers:
            total += number
        print(name, kind, shape, f"{total:.12e}")
