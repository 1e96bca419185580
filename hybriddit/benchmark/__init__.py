"""`hybriddit benchmark`: the speed of hybrid attention on this machine, beside dense and circular-window attention."""
