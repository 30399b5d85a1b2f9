"""Compare a loss and its gradient across NumPy, every device, and PyTorch."""
