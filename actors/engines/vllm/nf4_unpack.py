"""PTX with which kernels.py unpacks NF4 weights: it looks all values up in registers.

A module of its own, so that it can be tested without a GPU.
"""

import torch
from bitsandbytes.functional import get_4bit_type


def unpack_ptx() -> str:
    """PTX that turns the four packed bytes in $8 into eight float32 numbers.

    $0 to $3 are the numbers of the high halves, $4 to $7 those of the low halves. The upper three bytes of the table's
    16 float32 entries are in registers as byte planes. `prmt` looks up four entries of a plane at a time by the lower
    three bits of their indices, in both halves of the plane, and the fourth bit (copied over a byte by `prmt`'s sign
    mode) chooses between them. Three planes make a number; its lowest byte is a copy of the next one.
    """
    table = [value & 0xFFFFFFFF for value in get_4bit_type("nf4", device="cpu").view(torch.int32).tolist()]

    def look_up(register: str, shift: int) -> str:
        plane = [(value >> shift) & 0xFF for value in table]
        w = [sum(plane[4 * i + j] << (8 * j) for j in range(4)) for i in range(4)]
        return f"prmt.b32 a, {w[0]}, {w[1]}, s; prmt.b32 b, {w[2]}, {w[3]}, s; lop3.b32 {register}, a, b, m, 216;\n"

    def half(index: str, first: int) -> str:
        return (
            f"{index} and.b32 n, n, 0x0f0f0f0f; and.b32 t, n, 0x07070707;\n"
            "shr.b32 s, t, 4; or.b32 s, s, t; and.b32 s, s, 0x00ff00ff; shr.b32 t, s, 8; or.b32 s, s, t;\n"
            "shl.b32 m, n, 4; prmt.b32 m, m, 0, 0xba98;\n"
            + look_up("p", 24)
            + look_up("q", 16)
            + look_up("r", 8)
            + "prmt.b32 a, q, p, 0x5140; prmt.b32 b, q, p, 0x7362;\n"
            f"prmt.b32 ${first}, r, a, 0x5400; prmt.b32 ${first + 1}, r, a, 0x7611;\n"
            f"prmt.b32 ${first + 2}, r, b, 0x5422; prmt.b32 ${first + 3}, r, b, 0x7633;\n"
        )

    body = half("shr.b32 n, $8, 4;", 0) + half("mov.b32 n, $8;", 4)
    return "{ .reg .b32 n, s, t, m, a, b, p, q, r;\n" + body + "}"
