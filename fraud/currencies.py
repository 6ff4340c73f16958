"""Amounts of several currencies on one scale: percent of the currency's typical amount.

States keep amounts as whole hundredths, from 0.01 to 43 million. That range suits euros: amounts in dong would exceed
it, amounts in bitcoin would vanish. So an amount enters them as ``100 * amount / typical``, both in whole minor units
of the currency (ISO 4217). The quotient of two whole numbers is rounded once, so it is the same wherever it is
computed, and the same for amounts and typical amounts that are 16,000 times as large.
"""

from __future__ import annotations

from math import floor

import msgspec
import numpy as np
from numpy.typing import NDArray

_CODES = """
AED AFN ALL AMD AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD CAD CDF CHE CHF
CHW CLF CLP CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GNF GTQ GYD HKD
HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL
MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON
RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX
USD USN UYI UYU UYW UZS VED VES VND VUV WST XAF XCD XOF XPF YER ZAR ZMW ZWG
"""
_WITHOUT_DECIMALS = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_MINOR_DIGITS = {
    **dict.fromkeys(_CODES.split(), 2),
    **dict.fromkeys(_WITHOUT_DECIMALS.split(), 0),
    **dict.fromkeys(("BHD", "IQD", "JOD", "KWD", "LYD", "OMR", "TND"), 3),
    **dict.fromkeys(("CLF", "UYW"), 4),
}
"""Of the codes of ISO 4217, how many decimal places their minor unit has."""
MAX_MINOR_DIGITS = 18
MAX_MINOR_UNITS = 2.0**53
"""Above it, floats skip whole numbers."""


class Currency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a model knows of a currency: the decimal places of its minor unit, and its typical amount in that unit."""

    minor_digits: int
    typical_minor_units: int


def iso_minor_digits(code: str) -> int | None:
    """Return the decimal places of a currency's minor unit, or None where ISO 4217 has no such code.

    Examples
    --------
    >>> [iso_minor_digits(code) for code in ("EUR", "VND", "KWD", "BTC")]
    [2, 0, 3, None]
    """
    return _MINOR_DIGITS.get(code)


def to_minor_units(amounts: NDArray[np.float64], minor_digits: int) -> NDArray[np.float64]:
    """Return amounts in whole minor units, from one to `MAX_MINOR_UNITS`, (n,) float64."""
    with np.errstate(over="ignore"):
        return np.floor(np.clip(amounts * 10.0**minor_digits + 0.5, 1.0, MAX_MINOR_UNITS))


def history_amounts(amounts: NDArray[np.float64], currency: Currency) -> NDArray[np.float64]:
    """Return amounts of one currency in percent of its typical amount, (n,) float64."""
    return to_minor_units(amounts, currency.minor_digits) * 100.0 / float(currency.typical_minor_units)


def history_amount(amount: float, currency: Currency) -> float:
    """Return one amount in percent of its currency's typical amount: `history_amounts` without an array.

    Examples
    --------
    >>> history_amount(10.53, Currency(2, 4_173)) == history_amount(168_480, Currency(0, 667_680))
    True
    """
    minor_units = floor(min(max(amount * 10.0**currency.minor_digits + 0.5, 1.0), MAX_MINOR_UNITS))
    return minor_units * 100.0 / float(currency.typical_minor_units)
