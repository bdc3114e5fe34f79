"""Targets, methods, grids and their scores: every way to steer on one scoreboard."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "methods": ["Method", "SteeringConfig", "SteeringInputs", "get_method", "steer"],
    },
)
