"""The promotion gate: compares a version with the one in production and with the installed libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fraud.errors import RegistryError
from fraud.models.registry import Version

WITH_LABELS, WITHOUT_LABELS = "average_precision", "seed_agreement"
"""What is compared; of two versions whose trainings had no labels, how stable their scores are."""
LOWER_IS_BETTER = ("brier", "calibration_error", "cost", "loss", "psi")
COMPARED_LIBRARIES = ("lightgbm", "scikit-learn", "numpy")


class GateFailed(RegistryError):
    """The candidate was refused; `reasons` says why, one sentence each."""

    http_status = 409
    code = "gate_failed"

    def __init__(self, candidate: Version, reasons: list[str]) -> None:
        super().__init__(
            f"{candidate} is not promoted: {'; '.join(reasons)}. To promote it all the same, give --force and --why"
        )
        self.reasons = reasons


def check(
    candidate: Version, production: Version | None, installed: Mapping[str, str], metric: str = WITH_LABELS
) -> list[str]:
    """Reasons to refuse `candidate`; empty when it passes.

    It is refused when its `metric` is worse than the interval of the model in production, when it was trained with
    another release (major.minor) of a library than is installed, or when kind or feature specification differ, which
    would break callers. In place of `average_precision`, two versions whose trainings had no labels are compared by
    `seed_agreement`.
    """
    reasons = [
        f"trained with {name} {trained}, installed is {installed.get(name, 'none')}"
        for name, trained in mismatches(candidate.facts.get("libraries", {}), installed).items()
        if release(trained) != release(installed.get(name, ""))
    ]
    if production is None or production.digest == candidate.digest:
        return reasons
    for fact, words in (("kind", "kind of model"), ("features_digest", "feature specification")):
        if candidate.facts.get(fact) != production.facts.get(fact):
            reasons.append(f"its {words} differs from that of {production}")
    if reason := worse(candidate, production, metric):
        reasons.append(reason)
    return reasons


def worse(candidate: Version, production: Version, metric: str) -> str | None:
    """Return how far `candidate` lies outside the interval of `production`, in words, or None."""
    if metric == WITH_LABELS and all(_has_no_labels(version) for version in (candidate, production)):
        metric = WITHOUT_LABELS
    if metric not in candidate.metrics or metric not in production.metrics:
        lacking = candidate if metric not in candidate.metrics else production
        return f"{lacking} has no metric {metric!r} to compare (it has {', '.join(sorted(lacking.metrics)) or 'none'})"
    ours, theirs = candidate.metrics[metric], production.metrics[metric]
    lower_is_better = any(word in metric for word in LOWER_IS_BETTER)
    limit = theirs["high"] if lower_is_better else theirs["low"]
    if (ours["value"] > limit) if lower_is_better else (ours["value"] < limit):
        return (
            f"{metric} {ours['value']:.4f} is worse than that of {production}, "
            f"{theirs['value']:.4f} [{theirs['low']:.4f}, {theirs['high']:.4f}]"
        )
    return None


def _has_no_labels(version: Version) -> bool:
    return WITHOUT_LABELS in version.metrics and WITH_LABELS not in version.metrics


def mismatches(trained: Mapping[str, str], installed: Mapping[str, str]) -> dict[str, str]:
    """Compared libraries whose installed version differs from training's."""
    compared = [name for name in COMPARED_LIBRARIES if name in trained]
    return {name: trained[name] for name in compared if trained[name] != installed.get(name)}


def release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def facts_of(manifest: Any) -> dict[str, Any]:
    """What the gate compares, from a bundle's manifest."""
    return {
        "kind": manifest.kind,
        "features_digest": manifest.features_digest,
        "libraries": dict(manifest.libraries),
        "git_commit": manifest.git_commit,
    }
