"""The scoring core: what a transaction meets between validation and decision, the same online and offline."""

import os

# Read by OpenMP when LightGBM is loaded. Threads that spin while they wait make training seven times slower on cores
# that have other work, and no faster on quiet ones.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Read by BentoML when it is imported. What is served and where is told to nobody unless the user asks for it.
os.environ.setdefault("BENTOML_DO_NOT_TRACK", "True")
