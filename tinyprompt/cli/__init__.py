"""The command line: arguments, help and output. Computation is in the other folders."""
