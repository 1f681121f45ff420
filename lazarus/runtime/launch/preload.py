"""Imports that the fork server makes once, so that each forked process starts in milliseconds.

Nothing here may start a thread: threads do not survive a fork.
"""

import scipy.optimize  # noqa: F401 - of the first plan
import torch

import lazarus.runtime.controller.shell
import lazarus.runtime.worker.process  # noqa: F401

torch.set_num_threads(1)
# The first optimizer of a process imports the compiler's front end, which takes over a second.
torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], fused=True)
