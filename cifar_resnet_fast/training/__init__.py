"""One training: its settings, its step, its state and its folder."""
