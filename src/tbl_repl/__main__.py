"""``python -m tbl_repl`` is ``tbl-repl``."""

from __future__ import annotations

import sys

from tbl_repl.cli import main

sys.exit(main())
