"""Where a lost expert comes back from, what that costs, and what a policy may answer. PURE."""
