"""Personas: pairs of answers, DPO, and a scorecard."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "personas": ["PERSONAS", "TYPES", "opposite"],
        "pairs": ["load_pairs"],
        "configs": ["PersonaConfig", "ScorecardConfig"],
        "readers": ["load_readers"],
        "training": ["train_persona_job"],
        "subjects": ["load_subject"],
        "scorecard": ["scorecard_job"],
    },
)
