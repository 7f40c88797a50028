"""Settings that must be made before any test's imports."""

import os

from hypothesis import HealthCheck, settings

# Kernels are interpreted, so that no GPU is needed. Triton reads this once, when the first of our
# dependencies imports it.
os.environ["TRITON_INTERPRET"] = "1"

# How long examples take says how busy the machine is, and tests never assert time. The same ones
# are drawn every time: whether a change may land is no matter of chance.
settings.register_profile(
    "certain", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("certain")
