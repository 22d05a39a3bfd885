"""`python -m reward FILE.yaml [key=value ...]` trains a reward model; see `reward.train`."""

import sys

from reward.run import leave
from reward.train import main

leave(main(sys.argv[1:]))
