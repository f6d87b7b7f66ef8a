"""`python -m gemcutter`."""

import sys

from gemcutter.cli import main

sys.exit(main())
