"""The scales of a table's currencies, from the training window or the mapping, and its amounts on them."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from fraud.currencies import Currency, history_amounts, iso_minor_digits, to_minor_units
from fraud.errors import DataError
from training.mapping_parts import CurrencyColumn

Floats = NDArray[np.float64]


def minor_digits_of(code: str, spec: CurrencyColumn) -> int | None:
    """Return the decimal places of a currency from the mapping, else from ISO 4217; None if unknown."""
    return spec.minor_digits.get(code, iso_minor_digits(code))


def scales(table: pd.DataFrame, spec: CurrencyColumn, learn: slice) -> dict[str, Currency]:
    """Return the scale of each currency of a table.

    Parameters
    ----------
    table : DataFrame
        The canonical table, with ``currency``.
    spec : CurrencyColumn
        Typical amounts that the mapping gives are taken; of the other currencies, the lower median is.
    learn : slice
        The rows for the medians: the training window.

    Raises
    ------
    DataError
        A currency occurs only outside that window and has no typical amount in the mapping.
    """
    known = table.iloc[learn]
    found: dict[str, Currency] = {}
    late: list[str] = []
    for code in sorted({*(str(code) for code in table["currency"].cat.categories), *spec.typical}):
        digits = minor_digits_of(code, spec)
        assert digits is not None  # the mapping and the reader refuse others
        amounts = known.loc[(known["currency"] == code).to_numpy(), "amount"].to_numpy(np.float64)
        if code in spec.typical:
            typical = to_minor_units(np.array([spec.typical[code]]), digits)[0]
        elif len(amounts):
            typical = np.partition(to_minor_units(amounts, digits), (len(amounts) - 1) // 2)[(len(amounts) - 1) // 2]
        else:
            late.append(code)
            continue
        found[code] = Currency(digits, int(typical))
    if late:
        example = ", ".join(f"{code}: 50" for code in late)
        raise DataError(
            f"currency {', '.join(late)} comes only after the training window, which shows no typical amount of it; "
            f"give one in the mapping: currency: {{typical: {{{example}}}}}"
        )
    return found


def amounts_of(table: pd.DataFrame, currencies: dict[str, Currency]) -> Floats:
    """Return the amounts of a table in the unit of histories, (n,) float64.

    Raises
    ------
    DataError
        Rows are in a currency that the model does not know, or the table has none.
    """
    amounts = table["amount"].to_numpy(np.float64)
    if not currencies:
        return amounts
    if "currency" not in table.columns:
        raise DataError(f"the model reads amounts in {', '.join(currencies)}; name the currency in the mapping")
    codes = table["currency"]
    unknown = sorted(set(codes.cat.categories[np.unique(codes.cat.codes)]) - set(currencies))
    if unknown:
        raise DataError(f"currency {', '.join(unknown)} is not known to the model, which reads {', '.join(currencies)}")
    found = np.empty(len(table))
    for code, currency in currencies.items():
        rows = (codes == code).to_numpy()
        found[rows] = history_amounts(amounts[rows], currency)
    return found


def stakes(table: pd.DataFrame, currencies: dict[str, Currency], learn: slice) -> Floats:
    """Return the amounts in the currency that most rows of the training window have, by the typical amounts."""
    base = str(table["currency"].iloc[learn].mode().iloc[0])
    typical = currencies[base].typical_minor_units / 10.0 ** currencies[base].minor_digits
    same = (table["currency"] == base).to_numpy()
    amounts = table["amount"].to_numpy(np.float64)
    return np.where(same, amounts, amounts_of(table, currencies) * typical / 100.0)
