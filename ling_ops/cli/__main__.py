"""`python -m ling_ops.cli` is the same command as `ling-ops`."""

from __future__ import annotations

import sys

from ling_ops.cli import main

sys.exit(main())
