"""Perturb the KV cache by layer range, and steer by vectors, offsets and a guiding head."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "pplm_config": ["PPLMConfig"],
        "pplm": ["generate_pplm"],
        "vectors": ["SteeringVectors", "steering_vectors"],
    },
)
