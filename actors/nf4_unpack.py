"""How decode_kernels.py unpacks NF4 weights on a GPU: PTX that looks all values up in registers.

Apart from the kernels so that it can be read and tested where there is no GPU.
"""

import torch
from bitsandbytes.functional import get_4bit_type


def unpack_ptx() -> str:
    """PTX that turns four packed bytes ($8) into NF4 values, each as the sum of two bfloat16 numbers, which hold it to 16
    bits: of the high halves $0-$1 and $2-$3, of the low halves $4-$5 and $6-$7.

    The 16 values sit in registers as byte planes; `prmt` looks four entries up at a time by the lower three bits of
    their indices, in both halves of a plane, and the fourth bit (spread over a byte by `prmt`'s sign mode) chooses.
    """
    values = get_4bit_type("nf4", device="cpu")
    coarse = values.bfloat16()
    fine = (values - coarse.float()).bfloat16()

    def look_up(table: torch.Tensor, first: int) -> str:
        entries, lines = table.view(torch.int16).tolist(), ""
        for register, shift in (("h", 8), ("l", 0)):
            plane = [(value >> shift) & 0xFF for value in entries]
            w = [sum(plane[4 * i + j] << (8 * j) for j in range(4)) for i in range(4)]
            lines += (
                f"prmt.b32 a, {w[0]}, {w[1]}, s; prmt.b32 b, {w[2]}, {w[3]}, s; lop3.b32 {register}, a, b, m, 0xd8;\n"
            )
        return lines + f"prmt.b32 ${first}, l, h, 0x5140; prmt.b32 ${first + 1}, l, h, 0x7362;\n"

    def half(index: str, first: int) -> str:
        return (
            f"{index} and.b32 n, n, 0x0f0f0f0f; and.b32 t, n, 0x07070707;\n"
            "shr.b32 s, t, 4; or.b32 s, s, t; and.b32 s, s, 0x00ff00ff; shr.b32 t, s, 8; or.b32 s, s, t;\n"
            "shl.b32 m, n, 4; prmt.b32 m, m, 0, 0xba98;\n"
        ) + look_up(coarse, first) + look_up(fine, first + 2)  # fmt: skip

    body = half("shr.b32 n, $8, 4;", 0) + half("mov.b32 n, $8;", 4)
    return "{ .reg .b32 n, s, t, m, a, b, h, l;\n" + body + "}"
