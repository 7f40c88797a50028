"""Settings that must be made before any test's imports."""

import os

# Kernels are interpreted, so that no GPU is needed. Triton reads this once, when the first of our
# dependencies imports it.
os.environ["TRITON_INTERPRET"] = "1"
