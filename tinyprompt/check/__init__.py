"""The ledger: a loss and its gradient in NumPy, on every device and in PyTorch, side by side."""
