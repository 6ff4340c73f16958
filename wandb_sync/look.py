"""Looks up W&B once for a running service, which imports neither the SDK nor this package.

``python -m wandb_sync.look NAME …`` does for each model what ``fraud follow NAME --once`` does and prints one word:
``asked``, or ``off`` where there is no key. How each look went is in the registry, as always.
"""

from __future__ import annotations

import sys
from contextlib import suppress

from filelock import FileLock

from fraud.errors import FraudError
from fraud.settings import ModelSettings
from wandb_sync.models import Models
from wandb_sync.settings import WandbSettings


def main(names: list[str]) -> str:
    settings = WandbSettings.read()
    if not settings.online:
        return "off"
    models = Models(settings, ModelSettings.read().alias_order)
    settings.home.mkdir(parents=True, exist_ok=True)
    with FileLock(settings.home / "look.lock"):  # one look at a time, whichever worker asked for it
        for name in names:
            with suppress(FraudError):  # follow has noted it in the registry
                models.follow(name)
    return "asked"


if __name__ == "__main__":
    print(main(sys.argv[1:]))
