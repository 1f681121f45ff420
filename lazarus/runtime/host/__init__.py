"""The machine as any process of a run sees it: memory and GPUs, and the process's TCP sockets."""
