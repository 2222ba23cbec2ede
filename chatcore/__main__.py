"""``python -m chatcore`` is the command ``chatcore``."""

from .cli import main

raise SystemExit(main())
