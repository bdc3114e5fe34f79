"""Tune a chat model so that a tag in the chat template sets the class of its reply."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "configs": ["SFTTrainingConfig"],
        "templates": ["TagTemplate", "render_dialogue", "render_prompt"],
        "mask": ["check_template", "show_mask"],
        "adapters": ["load_adapter"],
        "training": ["train_adapter_job"],
        "tag_likelihood": ["tag_likelihoods"],
        "evaluation_config": ["SFTEvaluationConfig"],
        "evaluation": ["evaluate_sft"],
    },
)
