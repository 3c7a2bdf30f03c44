"""Pictures: Matplotlib axes in and out, readable without colour (line styles, markers, hatches).

Every function draws on the axes it is given and returns them; names become the legend or the axis.  NumPy or torch in.
"""

from deferral.plots.embedding import embed_2d
from deferral.plots.experts import expert_load, reliability, who_answers, who_answers_map
from deferral.plots.methods import cost_coverage, methods_side_by_side, risk_coverage
from deferral.plots.style import new_figure, save_figure

__all__ = [
    "cost_coverage",
    "embed_2d",
    "expert_load",
    "methods_side_by_side",
    "new_figure",
    "reliability",
    "risk_coverage",
    "save_figure",
    "who_answers",
    "who_answers_map",
]
