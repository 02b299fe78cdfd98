"""What DSpark is compared with, where it is more than a policy: each is an arm of :mod:`dspark.bench.arms`."""
