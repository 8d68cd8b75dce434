"""`python -m densepred`."""

import sys

from densepred.cli import main

sys.exit(main())
