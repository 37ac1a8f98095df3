"""What the experiments share: methods by name, runs on disk, sweeps over methods and seeds, tables."""

from experiments.harness.balancing import CHOICE, METHODS, Balancer, method_of
from experiments.harness.run import Run, environment
from experiments.harness.sweep import Job, sweep
from experiments.harness.tables import Metric, Table, summarize

__all__ = [
    "CHOICE",
    "METHODS",
    "Balancer",
    "Job",
    "Metric",
    "Run",
    "Table",
    "environment",
    "method_of",
    "summarize",
    "sweep",
]
