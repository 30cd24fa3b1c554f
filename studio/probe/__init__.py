"""What this machine has: cards, model folders, data files. Never torch."""
