"""Generate counter-based random numbers: each is a function of a key and has no hidden state.

A key is an int64 tensor. The same key gives the same numbers on every device, under `vmap`, in any
order of calls and with any number of processes. The mixing function is the finaliser of SplitMix64
(Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), which passes the
usual batteries of statistical tests.
"""

import math

import torch
from torch import Tensor

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_M1 = _signed(0xBF58476D1CE4E5B9)
_M2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, n: int) -> Tensor:
    # torch shifts int64 arithmetically; the mask makes it logical.
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _M1
    x = (x ^ _shift_right(x, 27)) * _M2
    return x ^ _shift_right(x, 31)


def key_of(*numbers: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the key of a tuple of integers, for example (seed, stream): int64 []."""
    key = torch.zeros((), dtype=torch.int64, device=device)
    for number in numbers:
        key = fold_in(key, number)
    return key


def fold_in(key: Tensor, number: int | Tensor) -> Tensor:
    """Derive an independent key from a key and a number (both broadcast)."""
    number = number * _GOLDEN if isinstance(number, Tensor) else _signed(number * _GOLDEN)
    return _mix(_mix(key + _GOLDEN) ^ _mix(torch.zeros_like(key) + number + _M1))


def _bits(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    counter = torch.arange(1, math.prod(shape) + 1, device=key.device) * _GOLDEN
    bits = _mix(_mix(key).unsqueeze(-1) + counter)
    return bits.unflatten(-1, shape) if shape else bits.squeeze(-1)


def uniform(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw uniform float32 numbers in [0, 1): key [...] -> [..., *shape]."""
    # 24 bits: every value is exact in float32, and 1.0 cannot occur.
    return _shift_right(_bits(key, shape), 40).to(torch.float32) * 2.0**-24


def normal(key: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal float32 numbers (Box-Muller): key [...] -> [..., *shape]."""
    # In float64, so that processors that round differently almost always agree in float32.
    radius = (-2 * torch.log1p(-uniform(fold_in(key, 1), shape).double())).sqrt()
    return (radius * torch.cos(2 * math.pi * uniform(fold_in(key, 2), shape).double())).float()


def integers(key: Tensor, shape: tuple[int, ...], high: int) -> Tensor:
    """Draw uniform int64 numbers in [0, high), high < 2**24: key [...] -> [..., *shape]."""
    return (uniform(key, shape) * high).to(torch.int64).clamp_max(high - 1)


def permutation(key: Tensor, size: int) -> Tensor:
    """Draw a permutation of 0..size-1: key [...] -> int64 [..., size].

    Sort keys are full 64-bit numbers and differ for each position, so the device breaks no ties.
    """
    return _bits(key, (size,)).argsort(-1)


def choice(key: Tensor, size: int, count: int) -> Tensor:
    """Draw `count` different numbers below `size`: key [...] -> int64 [..., count]."""
    return _bits(key, (size,)).topk(count).indices


def smallest(key: Tensor, excluded: Tensor, count: int) -> Tensor:
    """Draw `count` different positions not excluded: bool [..., M] -> int64 [..., count]."""
    order = _bits(key, excluded.shape[-1:]).masked_fill(excluded, torch.iinfo(torch.int64).max)
    return order.topk(count, largest=False).indices


def weighted(key: Tensor, weights: Tensor, count: int) -> Tensor:
    """Draw `count` different positions one after the other, in proportion to their weights.

    The smallest of exponential numbers divided by the weights (Efraimidis and Spirakis 2006), which
    are float64 [..., M], not negative, `count` of them positive: -> int64 [..., count].
    """
    uniform = (_shift_right(_bits(key, weights.shape[-1:]), 11).double() + 0.5) * 2.0**-53
    return (-uniform.log() / weights).topk(count, largest=False).indices
