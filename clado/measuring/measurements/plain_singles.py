"""Singles of uncorrected layers: the bench holds those."""

from clado.measuring.measurements import singles

measure = singles.measure
