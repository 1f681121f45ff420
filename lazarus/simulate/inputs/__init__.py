"""What a simulation assumes: model shapes, traces of fleets, faults, and what things cost."""
