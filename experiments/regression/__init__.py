"""Eleven properties of small molecules (QM9), learned together: `python -m experiments.regression --help`."""
