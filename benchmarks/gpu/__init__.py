"""All that is to be known of this package on a GPU, by one command: see :mod:`benchmarks.gpu.__main__`."""
