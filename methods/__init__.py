"""One file per merge method: pure tensor code, its parameters, its formula and its source."""
