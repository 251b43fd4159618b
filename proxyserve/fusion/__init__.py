"""Fusion: what a request asks for, and the small typed program that it compiles to.

    Fusion (rule + what stands beside it) ─compile─▶ Program (lanes by name) ─bind─▶ BoundProgram (models, prompts)

`rules/` has one file per rule; the formula is in its docstring.
"""
