"""`python -m align FILE.yaml [key=value ...]`: see `align.train`."""

import sys

from align.train import main

sys.exit(main(sys.argv[1:]))
