"""Property tests of the coder: the same examples each time, no limit on a first compilation."""

from hypothesis import settings

settings.register_profile("deterministic", deadline=None, derandomize=True)
settings.load_profile("deterministic")
