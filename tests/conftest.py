"""What every test shares: an environment without settings of the machine it runs on."""

from __future__ import annotations

import os

for name in [name for name in os.environ if name.startswith("CHATCORE_") and not name.startswith("CHATCORE_TEST_")]:
    del os.environ[name]
