"""The PTX that unpacks NF4, run by an interpreter of the few instructions that it uses."""

import random
import re
import struct

from bitsandbytes.functional import get_4bit_type

from actors.engines.vllm.nf4_unpack import unpack_ptx


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, prmt: each nibble of the selector picks a byte of b:a, or (fourth bit) copies that byte's sign."""
    pool = [(x >> (8 * i)) & 0xFF for x in (a, b) for i in range(4)]
    result = 0
    for i in range(4):
        nibble = (selector >> (4 * i)) & 0xF
        byte = pool[nibble & 7]
        result |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << (8 * i)
    return result


def lop3(a: int, b: int, c: int, table: int) -> int:
    bits = range(32)
    return sum((table >> (((a >> i) & 1) << 2 | ((b >> i) & 1) << 1 | ((c >> i) & 1)) & 1) << i for i in bits)


OPERATIONS = {
    "prmt": prmt,
    "lop3": lop3,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "mov": lambda a: a,
    "shr": lambda a, n: a >> n,
    "shl": lambda a, n: (a << n) & 0xFFFFFFFF,
}


def run(packed: int) -> list[float]:
    """The numbers that the kernel unpacks from four bytes: of their high halves, then of their low halves."""
    registers = {"$8": packed}
    for name, operands in re.findall(r"(\w+)\.b32 ([^;]+);", unpack_ptx().split(";", 1)[1]):
        target, *sources = (word.strip() for word in operands.split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [struct.unpack("<f", struct.pack("<I", registers[f"${i}"]))[0] for i in range(8)]


def test_every_byte_becomes_its_two_values():
    table = get_4bit_type("nf4", device="cpu").tolist()
    draw = random.Random(0)
    order = [*range(256), *(draw.randrange(256) for _ in range(256))]
    for i in range(0, len(order), 4):
        four = order[i : i + 4]
        unpacked = run(sum(byte << (8 * j) for j, byte in enumerate(four)))
        expected = [table[byte >> 4] for byte in four] + [table[byte & 15] for byte in four]
        # 16 bits of the mantissa hold the table far closer than the bfloat16 that a product is rounded to.
        assert all(abs(a - b) <= 2**-15 * abs(b) for a, b in zip(unpacked, expected, strict=True))
