"""Court cases in the columns of a contest: who wins?"""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "cases": ["read_cases"],
        "parties": ["find_parties"],
        "questions": ["ask_about", "case_prompt"],
        "scoring": ["compare_judgements", "judgement_scores", "split_folds"],
    },
)
