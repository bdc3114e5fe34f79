"""Read act and emotion from hidden states; judge replies by a second model."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "head": ["AttributeHead", "fit_head"],
        "configs": ["JudgeConfig"],
        "judge": ["Judge"],
        "judge_training": ["train_judge"],
        "defaults": ["default_head", "default_judge"],
    },
)
