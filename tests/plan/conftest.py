"""Fixtures of this room; see conftest_plan."""

from conftest_plan import config, shape  # noqa: F401
