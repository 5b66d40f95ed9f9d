"""The option-A shortcut: operation and implementations."""
