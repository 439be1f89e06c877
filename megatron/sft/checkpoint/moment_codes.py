"""Moments of AdamW in 8 bits an element: OPTIMIZER_PRECISION=8bit.

Blocks of 64 elements share an exponent, as in Dettmers et al. (2022, "8-bit Optimizers via Block-wise Quantization"); it is a
power of two, as in Rouhani et al. (2023, "Microscaling Data Formats"). A code counts floating-point numbers down from the
block's largest: with 4 bits of mantissa in its upper half, with 3 below. Second moments reach down to 2^-24 of the largest,
first ones, which have the size of their roots, to 2^-12. What is smaller is 0 as a first moment and the smallest number as a
second one, so that no update is divided by a second moment that was rounded away.

Each step rounds up or down at random, with the probability that keeps the mean: to the nearest, a moment that moves by 1 % a
step would never move. The random numbers follow from the step and the element's place in its parameter, so that a resumed run,
and copies of a parameter in several processes, get the same ones.
"""

import torch
from torch import Tensor

# Elements with one exponent. Processes' shares of a parameter start at multiples of it, as training/optimizer.py pads buckets.
BLOCK = 64
KINDS = ("exp_avg", "exp_avg_sq")
# Half of the unit of 3 bits of mantissa of a float32, for rounding to the nearest number.
_NEAREST = 1 << 19
_PIECE = 1 << 22


def empty_codes(like: Tensor) -> dict[str, Tensor]:
    """Both moments as zeros for a tensor of `like`'s shape: uint8 codes in its shape, and a uint8 exponent for each block."""
    num_blocks = -(-like.numel() // BLOCK)
    exponents = torch.zeros(num_blocks, dtype=torch.uint8, device=like.device)
    return {
        name: tensor
        for kind in KINDS
        for name, tensor in ((kind, torch.zeros_like(like, dtype=torch.uint8)), (exponents_of(kind), exponents.clone()))
    }


def exponents_of(kind: str) -> str:
    """The name of the blocks' exponents next to the codes of a moment."""
    return f"{kind}_exponents"


def decoded(state: dict[str, Tensor], kind: str) -> Tensor:
    """float32 values of a moment, in the shape of its codes."""
    codes, exponents = state[kind], state[exponents_of(kind)]
    values = torch.empty_like(codes, dtype=torch.float32)
    parts = codes.view(-1).split(_PIECE), exponents.split(_PIECE // BLOCK), values.view(-1).split(_PIECE)
    for part, of_blocks, out in zip(*parts, strict=True):
        out.copy_(decode(part, of_blocks, kind))
    return values


def set_codes(state: dict[str, Tensor], kind: str, values: Tensor) -> None:
    """Round float32 `values` to the nearest numbers; those that codes gave stay as they are."""
    codes, exponents = state[kind].view(-1), state[exponents_of(kind)]
    for start in range(0, codes.numel(), _PIECE):
        stop, blocks = start + _PIECE, slice(start // BLOCK, (start + _PIECE) // BLOCK)
        piece = values.reshape(-1)[start:stop].to(codes.device)
        codes[start:stop], exponents[blocks] = encode(piece, kind, torch.full_like(piece, _NEAREST, dtype=torch.int32))


def encode(values: Tensor, kind: str, random: Tensor) -> tuple[Tensor, Tensor]:
    """[elements] uint8 codes and [blocks] uint8 exponents of [elements] float32 values. The kernel does the same.

    random: [elements] int32 of 20 bits, which decide what is rounded up.
    """
    levels, fine = _levels(kind)
    bits, random = (_in_blocks(each) for each in (values.abs().view(torch.int32), random))
    exponents = (bits + (random >> 1) >> 23).amax(dim=1, keepdim=True)
    is_fine = bits >> 23 > exponents - fine // 16
    # Numbers of 4 bits of mantissa, counted from 0. A coarse one is even.
    numbers = torch.where(is_fine, bits + (random >> 1) >> 19, (bits + random >> 20) << 1)
    below = 16 * exponents + 15 - numbers
    codes = torch.where(below < fine, levels - below, levels - fine - (below - fine >> 1))
    codes = codes.clamp(min=0 if kind == "exp_avg" else 1) * (bits > 0)
    codes = codes.view(-1)[: len(values)]
    if kind == "exp_avg":
        codes |= ((values < 0) & (codes > 0)).int() << 7
    return codes.to(torch.uint8), exponents.view(-1).to(torch.uint8)


def decode(codes: Tensor, exponents: Tensor, kind: str) -> Tensor:
    """[elements] float32 values of what `encode` returned."""
    levels, fine = _levels(kind)
    wide = _in_blocks(codes.int())
    below = levels - (wide & levels)
    below = torch.where(below < fine, below, 2 * below - fine + 1)
    numbers = (16 * exponents.int()[:, None] + 15 - below).clamp(min=1)
    bits = (numbers << 19) * ((wide & levels) > 0)
    values = bits.view(torch.float32)
    if kind == "exp_avg":
        values = torch.where(wide > levels, -values, values)
    return values.view(-1)[: len(codes)]


def random_bits(start: int, num_elements: int, seed: int, place: torch.device) -> Tensor:
    """[num_elements] int32: mixed bits of each element's place in its parameter, from `start`. The kernel makes the same.

    Wellons (2018), "Prospecting for Hash Functions": lowbias32.
    """
    # Products wrap; the second factor is 0x846CA68B. A mask drops the copies of the sign that a shift brings in.
    mixed = torch.arange(start, start + num_elements, device=place).int() ^ seed
    mixed = (mixed ^ (mixed >> 16 & 0xFFFF)) * 0x7FEB352D
    mixed = (mixed ^ (mixed >> 15 & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return mixed ^ (mixed >> 16 & 0xFFFF)


def seed_of(step: int) -> int:
    """An int32 whose bits all depend on the step."""
    return int(random_bits(step, 1, 0x5EED, torch.device("cpu")))


def _levels(kind: str) -> tuple[int, int]:
    """The largest code without a sign, and how many of them, from the largest down, have 4 bits of mantissa."""
    return (127, 64) if kind == "exp_avg" else (255, 128)


def _in_blocks(elements: Tensor) -> Tensor:
    """[blocks, BLOCK], with zeros after the last element."""
    return torch.nn.functional.pad(elements, (0, -len(elements) % BLOCK)).view(-1, BLOCK)
