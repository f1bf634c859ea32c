"""Calls of experts' MLPs that the contract refuses."""

import torch

from conformance.spec import mistake, wrong_option

ERRORS = (
    mistake("x is a vector", ValueError, "x", lambda i: {"x": i["x"][0]}, undefined=True),
    mistake("x is integer", TypeError, "x", lambda i: {"x": i["x"].long()}),
    mistake("gate_up is a matrix", ValueError, "gate_up", lambda i: {"gate_up": i["gate_up"][0]}, True),
    mistake("gate_up has an odd number of rows", ValueError, "gate_up", lambda i: {"gate_up": i["gate_up"][:, 1:]}),
    mistake("gate_up is one column short", ValueError, "gate_up", lambda i: {"gate_up": i["gate_up"][..., 1:]}, True),
    mistake("gate_up is wider than x", TypeError, "gate_up", lambda i: {"gate_up": i["gate_up"].double()}),
    mistake("down has one expert less", ValueError, "down", lambda i: {"down": i["down"][1:]}, True),
    mistake("down is transposed", ValueError, "down", lambda i: {"down": torch.cat([i["down"].mT] * 2, 1)}, True),
    mistake("down is wider than x", TypeError, "down", lambda i: {"down": i["down"].double()}),
    mistake(
        "indices of one token too few",
        ValueError,
        "expert_indices",
        lambda i: {"expert_indices": i["expert_indices"][1:]},
        undefined=True,
    ),
    mistake(
        "indices are floats", TypeError, "expert_indices", lambda i: {"expert_indices": i["expert_indices"].float()}
    ),
    mistake(
        "weights would broadcast",
        ValueError,
        "expert_weights",
        lambda i: {"expert_weights": i["expert_weights"][:1]},
    ),
    mistake(
        "an index is the number of experts",
        ValueError,
        "expert_indices",
        lambda i: {"expert_indices": torch.full_like(i["expert_indices"], len(i["gate_up"]))},
        undefined=True,
        device="cpu",
    ),
    mistake(
        "an index is negative",
        ValueError,
        "expert_indices",
        lambda i: {"expert_indices": torch.full_like(i["expert_indices"], -1)},
        undefined=True,
        device="cpu",
    ),
    wrong_option("an unknown activation", "activation", activation="relu"),
)
