"""Two overlaid garments (Fashion-MNIST), each to be named: `python -m experiments.fashion --help`."""
