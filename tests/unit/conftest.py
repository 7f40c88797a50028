"""Settings that must be made before any test's imports."""

import os

from hypothesis import settings

# Kernels are interpreted, so that no GPU is needed. Triton reads this once, when the first of our
# dependencies imports it.
os.environ["TRITON_INTERPRET"] = "1"

# How long an example takes says how busy the machine is, and tests never assert time.
settings.register_profile("patient", settings(), deadline=None)
settings.load_profile("patient")
