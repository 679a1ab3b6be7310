"""The shop for `play.py`, which has no minute to wait: what a dead worker was sending is due in 3 s.

A lease must be longer than any freeze of a living worker; leave it alone in an application of yours.
"""

from idemq import outgoing

outgoing.LEASE = 3.0

from shop import app as app  # noqa: E402  # it is declared with the shorter lease
