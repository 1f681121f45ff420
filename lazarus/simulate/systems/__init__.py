"""The systems that are compared: ours by policy, and models of others on the same costs."""
