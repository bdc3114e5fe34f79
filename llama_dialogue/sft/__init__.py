"""Fine-tune a chat model so that a tag decides the emotion or the act of its reply."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "configs": ["SFTTrainingConfig"],
        "templates": ["TEMPLATES", "TagTemplate", "render_prompt"],
        "mask": ["show_mask"],
        "adapters": ["load_adapter"],
        "training": ["train_adapter_job"],
    },
)
