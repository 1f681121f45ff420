"""Choose the copy that a lost expert is restored from, and count the lost tokens. PURE."""
