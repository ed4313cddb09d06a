"""METHODS SIDE BY SIDE: the same data order and initial weights, one table."""
