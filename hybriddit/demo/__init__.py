"""The laptop-sized demonstration: its canvases, its judges, and the run itself."""
