"""Options that every projected optimizer refuses for a matrix of 8 x 6, each with a part of the message."""

PROJECTED = [
    ({"rank": 0}, "rank"),
    ({"rank": 7}, "rank.*smaller side.*7"),
    ({"rank": 2.5}, "rank"),
    ({"rank": (2, 2)}, "rank"),
    ({"update_interval": 0}, "update_interval"),
    ({"lr": -1.0}, "lr"),
    ({"betas": (1.0, 0.9)}, r"betas\[0\]"),
    ({"eps": -1.0}, "eps"),
    ({"weight_decay": -0.1}, "weight_decay"),
    ({"proj_type": "sdt"}, "proj_type.*nearest: std"),
]
