"""Golden files: small models with every intermediate value, for T5s that are written in other languages."""
