"""`python -m age_vlm`."""

import sys

from .cli import main


sys.exit(main())
