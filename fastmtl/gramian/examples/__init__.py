"""Losses of examples that do not depend on each other: the exact Gram matrix of B gradients from one backward pass.

A second pass finds which rows of a cotangent belong to which example (`layout`). A weight's products come from its
factors (`products`), those of entrywise parameters from their small gradients (`parts`); all other gradients are formed
(`formed`).
"""

from fastmtl.gramian.examples.engine import gram, update
from fastmtl.gramian.examples.passes import one_pass
from fastmtl.gramian.examples.products import Per

__all__ = ["Per", "gram", "one_pass", "update"]
