"""Exactness, proven and not claimed: that the text keeps the target's law, shown tier by tier (``python -m dspark.proof``).

enumeration: the law of small models, in fractions, over every branch · statistics: the law of the shipped model, by draws ·
texts: greedy texts of the shipped models, token for token · crossed: of tiny ones, with every policy and block size · planted: bugs
that the tests must catch · killed: runs that are killed and resumed.
"""
