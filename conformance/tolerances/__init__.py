"""How far may a result be from the truth? All that decides it; of the rest of the judge this package knows nothing.

`bounds` follows rounding errors through a computation that a spec states. `condition` measures them on a reference that
no spec describes, by runs that `disturbance` records or disturbs. `gates` derives from either how far a result may be
off, and compares.
"""
