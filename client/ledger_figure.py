"""A plan's cost as a picture: epsilon over rounds, for a few noise multipliers."""

from io import BytesIO
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from agssd_core.weights import write_bytes
from client.ledger_plan import NEIGHBOURS, Plan

_POINTS = 40
_COLOURS = ("#9aa5b1", "#1f5fa8", "#5b8cc0", "#93b5d8")


def draw_plan(plan: Plan, out: Path) -> None:
    """Write a PNG: the planned noise in bold, what was spent before, the budget as a line."""
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    terms, last = plan.terms, max(plan.rounds, 1)
    counts = np.unique(np.linspace(1, 2 * last, _POINTS).round().astype(int))
    for factor, colour in zip(NEIGHBOURS, _COLOURS, strict=True):
        sigma, planned = plan.sigma * factor, factor == 1
        costs = [terms.epsilon_after(sigma, int(count)) for count in counts]
        label = f"sigma {sigma:.3g}" + (" (planned)" if planned else "")
        axes.plot(counts, costs, color=colour, linewidth=2.6 if planned else 1.4, label=label)
    axes.plot([plan.rounds], [plan.epsilon], "o", color=_COLOURS[1], markersize=7)
    axes.annotate(
        f"{plan.rounds} rounds: epsilon {plan.epsilon:.2f}",
        (plan.rounds, plan.epsilon),
        xytext=(8, -14),
        textcoords="offset points",
        color=_COLOURS[1],
    )
    if plan.budget is not None:
        axes.axhline(plan.budget, color="#b3261e", linestyle="--", linewidth=1.2)
        axes.annotate(
            f"budget {plan.budget:g}",
            (1, plan.budget),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 4),
            textcoords="offset points",
            ha="right",
            color="#b3261e",
        )
    axes.set(
        xlabel=f"rounds of {terms.steps} steps",
        ylabel=f"epsilon at delta {terms.delta:g}",
        title=f"Cost of private rounds, a patient drawn with chance {terms.rate:.3g} a step",
    )
    axes.set_xlim(0, 2 * last)
    axes.set_ylim(bottom=0)
    axes.grid(color="#e3e6ea", linewidth=0.6)
    axes.legend(frameon=False, loc="upper left")
    target = BytesIO()
    figure.savefig(target, format="png")
    write_bytes(out, target.getvalue())
