"""How well a family does: accuracy per skill and law, and how much of the gap fusion closes."""
