"""The paper's experiments on fastmtl's public API: `python -m experiments.<name> --help`; see experiments/README.md."""
