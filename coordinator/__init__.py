"""The cloud daemon: plans rounds, collects updates, aggregates them as products."""

import os

# Before numpy is loaded: sums run beside each other in threads, and their bits do not depend on how many cores there are.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
