"""How does the judge come to the spec of an operation that it has never heard of? From a reference and an example call.

`example` reads the example. `definition` calls the reference. `learn` finds out by such calls which sizes, options and
values an argument may have. `writing` writes what was learned as a spec that a person can edit.
"""
