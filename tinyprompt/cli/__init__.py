"""The command line. Knows arguments and what is printed, and computes nothing."""
