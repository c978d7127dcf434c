"""Fixtures of the proof tests; their code is in proof_setups.py, which test files import from."""

from proof_setups import no_hurry, parts_of, root  # noqa: F401
