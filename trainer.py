"""Train a persona: python trainer.py --dataset_dir sample --beta 0.1 --output_dir runs/infp --epoch 3 --mbti INFP"""

from llama_dialogue.dpo.commands import trainer

if __name__ == "__main__":
    trainer()
