"""The exact Gram matrix of the tasks' parameter gradients from activations and cotangents, without the gradients.

The graph is cut where the losses' own parts end (`survey`). Each parameter gets a closed form (`forms`, one per file)
or T explicit gradients, whichever is cheaper (`plan`, `cost`). One pass goes through the losses' own parts, and T
cotangents through the rest (`engine`), where the Gram matrix is contracted (`contraction`): docs/methods.md.
"""

from fastmtl.gramian.contraction import CANCELLED, Contraction, gram_of_factors
from fastmtl.gramian.engine import update
from fastmtl.gramian.trunk import Trunk, working_dtype

__all__ = ["CANCELLED", "Contraction", "Trunk", "gram_of_factors", "update", "working_dtype"]
