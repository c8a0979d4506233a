"""Compare a fixed head with other ways to store the original's classifier in few bytes.

`alternatives` makes them: rounded integers, a truncated SVD, pruned weights. `paired` has the statistics of two
classifiers on the same images, and `compare` puts all of them into one table.
"""
