"""What may other people's code raise when it is only tried, such as a module's forward on random tensors?"""

FAILURES = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
