"""The reliability suite: faults injected on purpose, each as often as its row says.

It stands beside ``benchmarks`` because it is a measurement that is committed and quoted
(docs/reliability.md), not a test; it uses the toys and the real processes of ``tests/support``.
"""
