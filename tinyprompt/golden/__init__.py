"""Golden files: small models with every intermediate value, to test T5 implementations in other languages."""
