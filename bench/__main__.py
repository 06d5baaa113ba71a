"""`python -m bench --base REV`."""

import sys

from .compare import main

sys.exit(main())
