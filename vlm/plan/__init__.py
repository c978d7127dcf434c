"""Will it fit: what a run takes on every device, computed from shapes alone."""
