"""The toy problem of the paper (Appendix C, Figures 1 and 6): two losses of two parameters, five starts, any weights.

Where to look: `problem` has the losses and what is true of them (optimum, Pareto front), `methods` runs any method on
many problems at once, `training` is the run, `report` the table of end points, `plots` the figures.
"""

from experiments.toy.methods import NAMES
from experiments.toy.problem import INITS, losses, optimum, pareto_front
from experiments.toy.training import train

__all__ = ["INITS", "NAMES", "losses", "optimum", "pareto_front", "train"]
