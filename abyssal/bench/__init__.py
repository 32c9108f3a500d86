"""Everything beside its peers, on the device at hand: operations, the engine, training."""
