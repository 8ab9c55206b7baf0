"""Pages and PNGs for looking at label sets and training runs."""
