"""The exact Gram matrix of the tasks' parameter gradients from activations and cotangents, without the gradients.

One pass through the losses' own parts of the graph (`heads`), T cotangents through the part that they share (`trunk`),
where every weight has a closed form (`forms`, one a file) that is contracted (`contraction`) or T explicit gradients,
whichever is cheaper (`cost`), and one ordinary backward pass: docs/methods.md.
"""

from fastmtl.gramian.engine import update

__all__ = ["update"]
