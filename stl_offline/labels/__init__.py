"""Label sets: written, read, checked, joined by key and aligned; without torch and without FFCV."""
