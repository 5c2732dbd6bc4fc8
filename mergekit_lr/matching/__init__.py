"""Which parts of one network are which parts of another: symmetries as data, and permutations that align them."""
