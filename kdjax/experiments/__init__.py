"""Whole experiments as functions: the command line and the benchmarks call them.

Nothing in here is needed to distill a model of your own; it is how the pieces fit together when a
teacher, a control and several seeds are trained, measured and written down.
"""
