"""`python -m duolocal`."""

import sys

from duolocal.cli import main

sys.exit(main())
