"""The demonstration: real credit applications and two models trained on them."""
