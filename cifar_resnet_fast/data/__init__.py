"""Data sets as bytes, and batches of them on the device."""
