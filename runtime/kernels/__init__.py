"""Small kernels in C for what torch does on a CPU in many operations. Knows no model."""
