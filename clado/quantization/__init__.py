"""Each layer at each candidate bit-width: quantizers, corrections, preparation, training."""
