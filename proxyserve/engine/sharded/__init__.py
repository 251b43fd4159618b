"""A base in several processes: this one leads, the others follow."""
