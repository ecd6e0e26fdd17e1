"""Gaussian noise on an integer grid from a keystream that no seed can replay."""

from __future__ import annotations

import os

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes


def _keystream(n: int) -> np.ndarray:
    """n uint64 of AES-256-CTR keystream under a fresh key from the operating system."""
    encryptor = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(8 * n)), dtype=np.uint64)


def gaussian_on_grid(dimension: int, std: float, grid: float) -> torch.Tensor:
    """round(N(0, std²) / grid), int64 (dimension,): add it to an integer sum on the same grid.

    Box–Muller in fp64 on 53-bit uniforms; the tail ends at 8.5 std (mass 2·10⁻¹⁷).
    Guarantee: the summands lie on the grid, so the result equals a rounded continuous Gaussian
    mechanism: post-processing, no floating-point attack (Mironov 2012; Balle & Wang 2018).
    Errors: ValueError when std or grid is not positive: there is no noiseless call.
    """
    if not (std > 0 and grid > 0):
        raise ValueError("noise needs a positive standard deviation and grid")
    half = (dimension + 1) // 2
    bits = _keystream(2 * half) >> np.uint64(11)
    radius = np.sqrt(-2.0 * np.log((bits[:half] + 1.0) * 2.0**-53))  # argument in (0, 1]
    angle = (2.0 * np.pi * 2.0**-53) * bits[half:]
    normal = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:dimension]
    return torch.from_numpy(np.rint(normal * (std / grid)).astype(np.int64))
