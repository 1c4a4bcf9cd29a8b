"""Cold-start data from a teacher: ask, verify, filter, score, select, balance, write."""
