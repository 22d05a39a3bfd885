"""`python -m align FILE.yaml [key=value ...]`: see `align.train`."""

import sys

from align.train import main
from reward.run import leave

leave(main(sys.argv[1:]))
