"""What would another schedule have given? A law fitted to loss curves, and how far to trust it."""
