"""The methods: most map a Gram matrix to task weights; one method a file."""

from fastmtl.weighting.aligned import AlignedMTL
from fastmtl.weighting.graddrop import GradDrop
from fastmtl.weighting.mgda import MGDA

__all__ = ["MGDA", "AlignedMTL", "GradDrop"]
