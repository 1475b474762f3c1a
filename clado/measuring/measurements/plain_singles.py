"""Singles of uncorrected layers, which the bench holds."""

from clado.measuring.measurements import singles

measure = singles.measure
