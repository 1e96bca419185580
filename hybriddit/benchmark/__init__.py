"""`hybriddit benchmark`: how fast this machine computes hybrid attention, against dense and circular-window attention."""
