"""What every test shares: an environment without settings of the machine it runs on."""

from __future__ import annotations

import os

import hypothesis

for name in [name for name in os.environ if name.startswith("CHATCORE_") and not name.startswith("CHATCORE_TEST_")]:
    del os.environ[name]

# How long one example takes says more about what else the machine does than about the code.
hypothesis.settings.register_profile("chatcore", deadline=None)
hypothesis.settings.load_profile("chatcore")
