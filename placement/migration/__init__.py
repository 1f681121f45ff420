"""From one plan to the next with little movement: repair in place, and the schedule of moves."""
