"""Models, dialogues, generation, metrics, statistics, plots and run records."""

import lazy_loader as lazy

__getattr__, __dir__, __all__ = lazy.attach(
    __name__,
    submod_attrs={
        "errors": ["InputError", "MachineError"],
        "config": ["Config", "frozen"],
        "dialogues": ["Corpus", "Dialogue", "Example", "Turn", "load_corpus", "make_examples"],
        "models": ["ChatModel", "load_chat_model", "tiny_chat_model"],
        "generation_config": ["GenerationConfig"],
        "generation": ["Generations", "best_of_n", "generate", "stream"],
        "statistics": ["Interval"],
        "records": ["RunRecord", "load_rows"],
        "rendered": ["records_table"],
    },
)
