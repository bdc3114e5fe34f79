"""How a chat model is asked, and whether it answers as a person."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "prompts": ["SYSTEM_PROMPTS", "build_prompt"],
        "ai_talk": ["is_ai_talk"],
        "comparison": ["PromptingConfig", "run_prompting"],
    },
)
