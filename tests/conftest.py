import os

import torch
from hypothesis import settings

# A busy machine is no bug: properties are judged by their answer, not by their time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# The tests' models are tiny: threads would wait for each other longer than they work. Processes that tests start, too.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
