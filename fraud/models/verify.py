"""Verifies that a bundle scores here as in training, and with which libraries."""

from __future__ import annotations

import logging
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from fraud.models import gate

log = logging.getLogger(__name__)


def verify(bundle: Path, preprocessor: Path | None = None) -> None:
    """Check a bundle and score its golden rows; warn of libraries other than in training.

    Raises
    ------
    BundleError
        A file is missing, changed or unexpected, or a golden row scores differently than in training.
    """
    from fraud.models.scorer import Scorer  # takes a second to import, and a rollback needs none of it

    scorer = Scorer.load(bundle, preprocessor)
    installed = installed_libraries()
    for name, trained in gate.mismatches(scorer.bundle.manifest.libraries, installed).items():
        log.warning(
            "%s was trained with %s %s, installed is %s; its golden rows come out the same",
            scorer.bundle.manifest.name,
            name,
            trained,
            installed.get(name, "none"),
        )


def installed_libraries() -> dict[str, str]:
    """Versions of the libraries that scoring depends on; one that is not installed is left out."""
    found = {}
    for name in gate.LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
