"""What is fast, how fast, and how it was measured (layer 4)."""
