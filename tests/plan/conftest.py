"""Fixtures of this package; see conftest_plan."""

from conftest_plan import config, shape  # noqa: F401
