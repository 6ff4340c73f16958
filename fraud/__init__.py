"""The fraud decision service: one scoring core for training and serving, with its transports and commands."""

import os

__version__ = "0.1.0"

# Read by OpenMP when LightGBM is loaded. Threads that spin while they wait make training seven times slower on cores
# that have other work, and no faster on quiet ones.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read by BentoML when it is imported. BentoML sends no usage data unless the user asks for it.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
