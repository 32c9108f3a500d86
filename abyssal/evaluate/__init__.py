"""How well a model does: lm-evaluation-harness over the engine, benchmark sets by name, bits a byte of any text."""
