"""Everything is in pyproject.toml; the compiled extension will be declared here."""

from setuptools import setup

setup()
