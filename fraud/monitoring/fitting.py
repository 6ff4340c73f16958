"""What the reference says of each channel: its seasons, how quickly its level moves, its dispersion and dependence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fraud.compiling import compiled
from fraud.monitoring.hours import WEEK, Hours
from fraud.monitoring.sequential import BETS, Bools, ChannelKind, Channels, Floats

HALF_LIVES = (6, 12, 24, 48, 96, 168, 336)
TOLERANCE = {"location": 0.2, "spread": 0.25}
LEAST_WEEKS = 4


def fit_channels(y: Floats, n: Floats, hours: Hours, kinds: list[ChannelKind], *, dispersion: bool = True) -> Channels:
    """Learn from the reference what is usual of each channel.

    Parameters
    ----------
    y : (n_channels, n_hours) float64
        NaN in an hour without decisions.
    n : (n_channels, n_hours) float64
        Decisions.
    hours : Hours
        From a Monday's first hour.
    kinds : list of ChannelKind
    dispersion : bool
        False leaves out the variance that does not shrink with n, to show that the promise needs it.
    """
    channels = [_fit(y[i], n[i], hours, kind, dispersion) for i, kind in enumerate(kinds)]
    return Channels._make(np.array(column) for column in zip(*channels, strict=True))


def _fit(y: Floats, n: Floats, hours: Hours, kind: ChannelKind, dispersion: bool) -> tuple[Any, ...]:
    ok = np.isfinite(y) & (n > 0)
    usual = ok & ~hours.is_muted
    if usual.sum() < LEAST_WEEKS * WEEK // 2 or np.ptp(y[usual]) == 0:
        return _unwatched(float(y[usual][0]) if usual.any() else 0.0)
    season, month_end = _season(y, usual, hours)
    residual = np.where(ok, y - season[hours.of_week] - month_end * hours.is_month_end, np.nan)
    weekly = _weekly(residual, usual)
    variance = _variance(residual - np.nanmean(residual[usual]), n, usual, kind, dispersion)
    best, start = (np.inf, 0.0), float(np.mean(residual[np.flatnonzero(usual)[:WEEK]]))
    for _ in range(2):
        best = (np.inf, 0.0)
        for half_life in HALF_LIVES:
            gain = 1.0 - 2.0 ** (-1.0 / half_life)
            e, _ = _innovations(residual, n, hours.is_holiday, start, gain, *variance)
            best = min(best, (float(np.minimum(n[usual] * e[usual] ** 2, 75.0).sum()), gain))
        e, level = _innovations(residual, n, hours.is_holiday, start, best[1], *variance)
        variance = _variance(e, n, usual, kind, dispersion)
    sigma = np.sqrt(variance[0] / np.maximum(n, 1) + variance[1])
    z = np.where(usual, e / sigma, 0.0)
    lag_hour, lag_day = _lags(z)
    u, _ = _whitened(z, lag_hour, lag_day)
    scale = float(np.std(u[usual]))
    scale = scale if kind == "volume" else max(1.0, scale)
    u = np.clip(np.where(usual, u / scale, 0.0), -5, 5)[24:]
    delta = 1.5 * max(0.1, _lasting(u))
    limit = np.log(20 * len(y)) - 2  # one channel's reference, replayed, stays below this
    is_watched = False
    for _ in range(8):
        penalty = _penalty(u, delta, kind)
        if _highest(u, penalty, BETS) <= limit:
            is_watched = True
            break
        delta *= 1.4
    p = float(np.mean(np.sin(np.clip(y[usual] / 2, 0, np.pi / 2)) ** 2))
    tolerance = TOLERANCE.get(kind, 0.15 * 2 * np.sqrt(p) + (0.05 if kind == "rare" else 0.02))
    differences = np.diff(weekly)
    spread = np.sqrt(np.mean(differences**2)) if len(differences) and kind != "volume" else np.inf
    return (
        *(season, month_end, level, best[1], *variance, lag_hour, lag_day, scale, penalty),
        *(float(np.mean(weekly)), max(float(spread), 1e-9), tolerance, is_watched),
    )


def _unwatched(value: float) -> tuple[Any, ...]:
    never = np.full(len(BETS), np.inf)
    return np.full(WEEK, value), 0.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, never, 0.0, np.inf, 0.0, False


def _season(y: Floats, usual: Bools, hours: Hours) -> tuple[Floats, float]:
    """Return the profile of the week, shrunk to weekday or weekend by hour, and the effect of the month's end."""
    of_week, week = hours.of_week[usual], np.flatnonzero(usual) // WEEK
    value, at_end = y[usual], hours.is_month_end[usual]
    season, month_end, level = np.full(WEEK, value.mean()), 0.0, np.zeros(int(week.max()) + 1)
    of_day = np.arange(WEEK) % 24 + 24 * (np.arange(WEEK) >= 120)
    count = np.bincount(of_week, minlength=WEEK)
    for _ in range(4):
        season = _means(of_week, value - month_end * at_end - level[week], WEEK, count)
        pooled = np.bincount(of_day, weights=season * count, minlength=48) / np.maximum(
            np.bincount(of_day, weights=count, minlength=48), 1
        )
        season = np.where(count > 0, season, pooled[of_day])
        left = value - month_end * at_end - level[week] - season[of_week]
        noise = float(np.mean(left**2)) / max(1.0, float(count.mean()))
        between = float(np.mean((season - pooled[of_day]) ** 2))
        season = pooled[of_day] + max(0.0, 1 - noise / between if between else 0.0) * (season - pooled[of_day])
        if at_end.any():
            month_end = float(np.mean((value - season[of_week] - level[week])[at_end]))
        level = _means(week, value - season[of_week] - month_end * at_end, len(level))
        level -= level.mean()
    return season, month_end


def _means(group: NDArray[np.int64], value: Floats, size: int, count: NDArray[np.int64] | None = None) -> Floats:
    count = np.bincount(group, minlength=size) if count is None else count
    means: Floats = np.bincount(group, weights=value, minlength=size) / np.maximum(count, 1)
    return means


def _weekly(residual: Floats, usual: Bools) -> Floats:
    week = np.flatnonzero(usual) // WEEK
    count = np.bincount(week)
    means: Floats = np.bincount(week, weights=residual[usual]) / np.maximum(count, 1)
    return means[count >= WEEK // 2]


def _variance(e: Floats, n: Floats, usual: Bools, kind: ChannelKind, dispersion: bool) -> tuple[float, float]:
    """Return a and b of the variance a / n + b: least squares of e^2 on 1/n with weights n^2."""
    size, value = n[usual], np.minimum(n[usual] * e[usual] ** 2, 75.0 * np.median(n[usual] * e[usual] ** 2) + 1e-12)
    least = 1e-9 if kind == "volume" else 1.0
    if not dispersion:
        return 1.0, 0.0
    centred = size - size.mean()
    slope = float(centred @ value / (centred @ centred)) if centred.any() else 0.0
    intercept = float(value.mean()) - slope * float(size.mean())
    if slope <= 0:
        return max(least, float(value.mean())), 0.0
    if intercept < least:
        slope = max(0.0, float(size @ (value - least) / (size @ size)))
        intercept = least
    return intercept, slope


def _lags(z: Floats) -> tuple[float, float]:
    """Return the dependence on the hour and the day before, by Yule and Walker's equations."""
    c = np.clip(z, -4, 4)
    total = float(c @ c) or 1.0
    r1, r23, r24 = (float(c[lag:] @ c[:-lag]) / total for lag in (1, 23, 24))
    determinant = 1 - r23 * r23
    a1 = float(np.clip((r1 - r23 * r24) / determinant, -0.3, 0.9)) if determinant > 1e-9 else 0.0
    a24 = float(np.clip((r24 - r23 * r1) / determinant, 0.0, 0.6)) if determinant > 1e-9 else 0.0
    return a1, min(a24, 0.95 - max(a1, 0.0))


def _whitened(z: Floats, lag_hour: float, lag_day: float) -> tuple[Floats, Floats]:
    clipped = np.clip(z, -5, 5)
    u = z.copy()
    u[1:] -= lag_hour * clipped[:-1]
    u[24:] -= lag_day * clipped[:-24]
    return u, clipped


def _lasting(u: Floats) -> float:
    """Return how much of the means of days and of weeks is more than chance."""
    found = 0.0
    for length in (24, WEEK):
        whole = u[: len(u) // length * length].reshape(-1, length).mean(axis=1)
        found = max(found, float(np.var(whole)) - 1 / length) if len(whole) > 1 else found
    return float(np.sqrt(found))


def _penalty(u: Floats, delta: float, kind: ChannelKind) -> Floats:
    mean_exp = np.array([np.log(np.mean(np.exp(bet * u))) for bet in BETS])
    penalty: Floats = 1.05 * np.maximum(mean_exp, BETS**2 / 2) + np.abs(BETS) * (0.05 + delta)
    if kind == "rare":
        penalty[-2:] = np.inf
    return penalty


@compiled
def _innovations(
    residual: Any, n: Any, is_holiday: Any, level: Any, gain: Any, variance_per: Any, variance: Any
) -> Any:
    e = np.zeros(len(residual))
    for t in range(len(residual)):
        if not np.isfinite(residual[t]) or n[t] <= 0:
            continue
        e[t] = residual[t] - level
        if not is_holiday[t]:
            sigma = np.sqrt(variance_per / n[t] + variance)
            level += gain * min(3.0, max(-3.0, e[t] / sigma)) * sigma
    return e, level


@compiled
def _highest(u: Any, penalty: Any, bets: Any) -> Any:
    """Return the highest log of the mean wealth over a sequence."""
    wealth = np.full(len(bets), -np.inf)
    highest = -np.inf
    for t in range(len(u)):
        total = 0.0
        for k in range(len(bets)):
            if np.isfinite(penalty[k]):
                wealth[k] = np.log1p(np.exp(min(wealth[k], 600.0))) + bets[k] * u[t] - penalty[k]
                total += np.exp(min(wealth[k], 600.0))
        highest = max(highest, np.log(total / len(bets)))
    return highest
