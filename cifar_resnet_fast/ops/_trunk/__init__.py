"""The trunk: operation, schedule, autograd and implementations."""
