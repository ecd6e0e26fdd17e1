import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedtune.core.dp import clip


@pytest.mark.parametrize("mode", ["flat", "normalised"])
@given(
    scale=st.floats(-30, 30),
    d=st.integers(1, 4000),
    c=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_norm_is_at_most_c_in_fp64(mode: str, scale: float, d: int, c: float, seed: int) -> None:
    g = torch.randn(3, d, generator=torch.Generator().manual_seed(seed)) * 10.0**scale
    norms = torch.linalg.vector_norm(clip.clip(g, c, mode), dim=1)  # type: ignore[arg-type]
    assert bool((norms <= c).all())


def test_norms_in_bf16_would_break_the_bound() -> None:
    """The twin (trap 15): clipped by bf16 norms the same gradients exceed C; ours do not."""
    ours, theirs = [], []
    for d in range(1000, 1100):
        g = torch.rand(1, d, generator=torch.Generator().manual_seed(d)) + 0.5
        ours.append(float(clip.clip(g, 1.0).norm()))
        low = g.bfloat16()
        theirs.append(float((low / low.norm()).double().norm()))
    assert max(ours) <= 1.0
    assert max(theirs) > 1.001


def test_flat_keeps_short_gradients_and_normalised_lengthens_them() -> None:
    g = torch.tensor([[0.3, 0.4]])
    assert torch.allclose(clip.clip(g, 1.0), g.double(), rtol=1e-9)
    assert float(clip.clip(g, 1.0, "normalised", 0.01).norm()) == pytest.approx(0.5 / 0.51)


@pytest.mark.parametrize("mode", ["flat", "normalised"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])
def test_a_non_finite_unit_contributes_zero(mode: str, bad: float) -> None:
    g = torch.ones(3, 4)
    g[1, 2] = bad
    out = clip.clip(g, 1.0, mode)  # type: ignore[arg-type]
    assert torch.isfinite(out).all()
    assert float(out.norm(dim=1).max()) <= 1.0
    if not math.isfinite(bad):
        assert float(out[1].abs().max()) == 0.0


@pytest.mark.parametrize("mode", ["flat", "normalised"])
@pytest.mark.parametrize("value", [0.0, 5e-324, 1e-160])
def test_a_row_of_nearly_zeros_stays_zero(mode: str, value: float) -> None:
    """Also where the factor of such a row overflows, so that 0 times it is no number."""
    rows = torch.full((2, 3), value, dtype=torch.float64)
    assert not clip.scales([rows.clone()], 1.0, mode, gamma=1e-303).any()  # type: ignore[arg-type]
    assert not clip.clip(rows, 1.0, mode, gamma=1e-303).any()  # type: ignore[arg-type]


def on_grid(rows: torch.Tensor, grid: float) -> torch.Tensor:
    """The sum of rows that are short enough already."""
    total = torch.zeros(rows.shape[1], dtype=torch.int64)
    clip.add_clipped(total, clip.Chunk(range(len(rows)), [rows.clone()]), grid, 1e9)
    return total


def test_grid_is_a_power_of_two_and_fine_enough() -> None:
    for std in (1e-6, 0.37, 1.0, 1234.5):
        grid = clip.grid_for(std)
        assert math.log2(grid).is_integer()
        assert std * 2.0**-21 < grid <= std * 2.0**-20


def test_the_integer_sum_does_not_depend_on_order_or_chunks() -> None:
    g = clip.clip(torch.randn(50, 200, generator=torch.Generator().manual_seed(1)) * 100, 1.0)
    grid = clip.grid_for(1.0)
    whole = on_grid(g, grid)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    parts = sum(on_grid(part, grid) for part in g[order].split(7))
    assert torch.equal(whole, parts)


def test_sensitivity_covers_the_rounding() -> None:
    """Removing one unit moves the integer sum by at most C + √d·grid/2, and C alone is too little
    for the worst rounding (the twin)."""
    d, grid = 10_000, 2.0**-6
    x = torch.full((1, d), 1.0 / math.sqrt(d), dtype=torch.float64)
    x = (torch.floor(x / grid) + 0.5001) * grid  # each coordinate just above half a grid step
    c = float(x.norm())
    moved = float((on_grid(x, grid).double() * grid).norm())
    assert c < moved <= clip.sensitivity(c, d, grid)


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NO_GPU)])
def test_a_rows_scale_is_the_same_to_the_last_bit_beside_any_others(device: str) -> None:
    """Twin: of fp64 sums over other blocks some differ."""
    row = torch.randn(100_000, generator=torch.Generator().manual_seed(3))
    alone = clip.scales([row[None].to(device)], 0.5)
    for beside in (1, 2, 30, 63):
        rows = torch.cat([torch.randn(beside, len(row)), row[None]])
        assert clip.scales([rows.to(device)], 0.5)[-1] == alone[0]
    norms = set()
    for step in range(1000, 65_000, 1000):
        blocks = row.double().split(step)
        norms.add(float(sum(torch.linalg.vector_norm(block) ** 2 for block in blocks)))
    assert len(norms) > 1
