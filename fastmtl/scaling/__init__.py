"""Scaling studies: how time, memory and accuracy grow with tasks and parameters, here and now.

`python -m fastmtl scaling --out DIR` sweeps a grid of sizes and settings and leaves numbers and plots in the folder.
"""
