"""Text of a given form: JSON of a schema, regular expressions, choices, grammars and tagged calls, as masks over the
vocabulary."""
