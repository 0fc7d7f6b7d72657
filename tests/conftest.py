"""Settings of all tests."""

import os

from hypothesis import settings

# A shared machine is slow at times, which says nothing about an example. CI draws the same examples on every run.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")
