"""From one plan to the next with few moves: repair in place, and the list of transfers."""
