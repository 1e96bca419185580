"""`hybriddit demo`, a demonstration for a laptop: its images, the judge of them, and the run itself."""
