"""`python -m srft` is `srft`."""

import sys

from srft.cli import main

sys.exit(main())
