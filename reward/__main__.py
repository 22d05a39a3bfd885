"""`python -m reward FILE.yaml [key=value ...]` trains a reward model; see `reward.train`."""

import sys

from reward.train import main

sys.exit(main(sys.argv[1:]))
