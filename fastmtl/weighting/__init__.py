"""The methods: each maps a Gram matrix to task weights, one method a file."""

from fastmtl.weighting.aligned import AlignedMTL

__all__ = ["AlignedMTL"]
