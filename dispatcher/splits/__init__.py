"""Which replica serves which of an expert's tokens: integers that every rank computes alike."""
