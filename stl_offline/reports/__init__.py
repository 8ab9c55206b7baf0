"""Images of what label sets hold."""
