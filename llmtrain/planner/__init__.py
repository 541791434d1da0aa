"""What will a run cost, and does it fit? Arithmetic on the config alone: no torch, no GPU."""
