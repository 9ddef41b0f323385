"""GPU kernels in Triton, one file for each; imported only where they run."""
