"""Draw how well an attack tells members from others, together with the bound that ε sets."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np

from fedtune.audit.membership import Membership, tpr_bound


def curves(named: Mapping[str, Membership], epsilon: float | None, delta: float) -> bytes:
    """Draw a ROC curve with logarithmic axes, as a PNG: one line per attack, random guessing,
    and the bound of (ε, δ). named: the legend's text for each attack → its result. epsilon: None
    draws no bound."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 4.6), layout="constrained")
    axes = figure.subplots()
    grid = np.logspace(-4, 0, 200)
    if epsilon is not None:
        bound = [tpr_bound(a, epsilon, delta) for a in grid]
        axes.fill_between(grid, bound, 1, color="#d62728", alpha=0.08, linewidth=0)
        axes.plot(grid, bound, "--", color="#d62728", linewidth=1, label="the most that ε allows")
    axes.plot(grid, grid, ":", color="#888888", linewidth=1, label="guessing")
    for name, found in named.items():
        alarms, hits = np.array(found.curve).T
        label = f"{name}: area {found.auc[0]:.2f} ({found.auc[1]:.2f} to {found.auc[2]:.2f})"
        axes.plot(np.maximum(alarms, 1e-4), np.maximum(hits, 1e-4), linewidth=1.6, label=label)
    axes.set(xscale="log", yscale="log", xlim=(1e-3, 1), ylim=(1e-3, 1))
    axes.set_xlabel("others taken for members")
    axes.set_ylabel("members found")
    axes.legend(loc="lower right", fontsize=8, frameon=False)
    axes.grid(alpha=0.2, linewidth=0.5)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130, metadata={"Software": None})
    return image.getvalue()
