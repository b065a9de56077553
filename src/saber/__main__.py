"""`python -m saber`: the same as `saber`."""

import sys

from saber.cli.main import main

sys.exit(main())
