"""A small W&B server for tests: the protocol that the unmodified SDK and its wandb-core binary speak.

It proves the integration with the SDK, not the behaviour of W&B's own service.
"""

from tests.wandb_server.app import WandbServer
from tests.wandb_server.faults import Fault

__all__ = ["Fault", "WandbServer"]
