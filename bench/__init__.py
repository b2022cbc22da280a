"""What a connect costs, beside every peer: ``python -m bench``, or ``make bench``; CONTRIBUTING.md says more."""
