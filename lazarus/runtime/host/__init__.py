"""What any process of a run sees of its machine: its memory, and its own TCP sockets."""
