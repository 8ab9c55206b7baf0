"""Pictures of what label sets hold."""
