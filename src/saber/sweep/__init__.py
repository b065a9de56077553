"""Many settings of one model: grid, search, and what they share."""
