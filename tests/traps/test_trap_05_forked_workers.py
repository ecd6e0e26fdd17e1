"""Trap 5: forked workers must not share a noise generator; trap 6: the generator is AES itself."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from fedtune.core.dp import noise, sampling

FORKED = """
import os, sys
from fedtune.core.dp import noise, sampling
noise.gaussian_on_grid(4, 1.0, 2.0**-20), sampling.poisson(64, 0.5)
for _ in range(3):
    child = os.fork()
    if child == 0:
        drawn = noise.gaussian_on_grid(4, 1.0, 2.0**-20).tolist(), sampling.poisson(64, 0.5)
        os.write(1, (repr(drawn) + "\\n").encode())
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_forked_workers_draw_apart() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORKED], capture_output=True, text=True, check=True
    )
    drawn = [eval(line) for line in done.stdout.splitlines()]
    assert len(drawn) == 3
    assert len({str(noise) for noise, _ in drawn}) == 3
    assert len({str(sampled) for _, sampled in drawn}) == 3


def test_the_noise_is_a_function_of_the_systems_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known answer: with the operating system's bytes known, an AES of our own gives every draw.
    Any other generator, however seeded, gives another."""
    monkeypatch.setattr(os, "urandom", lambda n: bytes(range(n)))
    drawn = noise.gaussian_on_grid(64, 1.0, 2.0**-20)
    counters = [(int.from_bytes(bytes(range(16))) + block).to_bytes(16) for block in range(64)]
    cipher = Cipher(algorithms.AES(bytes(range(32))), modes.ECB()).encryptor()
    bits = np.frombuffer(cipher.update(b"".join(counters)), dtype=np.uint64) >> np.uint64(11)
    uniform = bits.astype(np.float64) * 2.0**-53
    expected = np.zeros(64)
    for half in np.split(uniform, 2):  # of variance 1/2 each
        radius = np.sqrt(-np.log(half[:32] + 2.0**-53))
        turns = 2.0 * np.pi * half[32:]
        expected += np.concatenate([radius * np.cos(turns), radius * np.sin(turns)]) * 2.0**20
    assert torch.allclose(drawn.double(), torch.from_numpy(expected), atol=1.0)


def test_the_sample_is_a_function_of_the_systems_bytes_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "urandom", lambda n: bytes(n // 2) + b"\xff" * (n - n // 2))
    assert sampling.poisson(10, 0.5) == [0, 1, 2, 3, 4]
