"""Whether what is here computes what it should: budgets, checks in processes of their own, times.

Used by ``selfcheck``, by ``train`` before a first run on a card, by the benches and the tests.
"""
