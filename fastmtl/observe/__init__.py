"""Observing a run: measures, a recorder for them, figures, and tables of results."""
