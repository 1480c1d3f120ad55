"""Small models whose weights follow from their names, and what the real peft makes of them.

`tests/benchmarks/check_peft.py --write` computes `peft_cases.json` with peft; tests/test_lora.py
compares minitune with it, without peft.
"""

import json
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from minitune.checkpoint import bert_names, save_model
from minitune.model import BertConfig, BertForSequenceClassification
from minitune.tokenizer import Tokenizer

FILE = Path(__file__).with_name("peft_cases.json")
CONFIG = BertConfig(
    vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
    intermediate_size=24, max_position_embeddings=32, id2label={0: "bad", 1: "fair", 2: "good"},
)  # fmt: skip
TEXTS = ["A fine, fine film.", "Two hours too long!", "Why?"]
SEQUENCES = [[2, 7, 8, 9, 30, 3], [2, 40, 3], [2, 11, 59, 12, 13, 14, 15, 16, 20, 3]]

# What peft was given, by the name of the case.
PEFT = {
    "query and value": {"peft_type": "LORA", "r": 4, "target_modules": ["query", "value"]},
    "pooler trained": {
        "peft_type": "LORA", "r": 2, "lora_alpha": 6, "lora_dropout": 0.1,
        "target_modules": ["key", "intermediate.dense"],
        "modules_to_save": ["pooler", "classifier"],
    },
    "ends with output.dense": {"peft_type": "LORA", "r": 3, "target_modules": ["output.dense"]},
    "rslora": {
        "peft_type": "LORA", "r": 4, "use_rslora": True, "init_lora_weights": "gaussian",
        "target_modules": r".*layer\.\d+\.output\.dense",
    },
    "all-linear": {"peft_type": "LORA", "r": 2, "use_dora": True, "target_modules": "all-linear"},
    "dora": {
        "peft_type": "LORA", "r": 4, "lora_alpha": 3, "use_dora": True,
        "target_modules": ["query", "value", "attention.output.dense"],
    },
}  # fmt: skip
# Options of minitune, whose adapter_config.json peft was given.
LORA = {"lora_rank": 8, "lora_alpha": 16.0, "lora_dropout": 0.0, "rslora": False, "dora": False}
EVERY_MAP = "query,key,value,attention.output.dense,intermediate.dense,output.dense"
OURS = {
    "lora": ("lora", LORA | {"lora_targets": EVERY_MAP}),
    "lora of two maps": ("lora", LORA | {"lora_targets": "value,output.dense", "rslora": True}),
    "lora with dora": ("lora", LORA | {"lora_targets": EVERY_MAP, "lora_rank": 2, "dora": True}),
    "ia3": ("ia3", {}),
}


def numbers(name: str, shape: tuple[int, ...]) -> Tensor:
    """What a tensor of this name holds: about normal, and for LayerNorms and (IA)³ around 1."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    values = torch.from_numpy(random.standard_normal(shape)).float()
    near_one = name.endswith(("LayerNorm.weight", "ia3_l", "lora_magnitude_vector"))
    return 1 + 0.3 * values if near_one else 0.3 * values


def write_base(directory: Path) -> None:
    """A BERT classifier with its tokenizer, as its names have it."""
    model = BertForSequenceClassification(CONFIG)
    state = model.state_dict()
    for name, tensor in state.items():
        parts = bert_names(name)
        for part, chunk in zip(parts, tensor.chunk(len(parts)), strict=True):
            chunk.copy_(numbers(part, tuple(chunk.shape)))
    model.load_state_dict(state)
    directory.mkdir()
    save_model(model, Tokenizer.train(TEXTS, CONFIG.vocab_size), directory)


def write_adapter(directory: Path, case: dict, base: Path) -> None:
    """A directory as peft wrote it for this case, with the numbers that follow from the names."""
    directory.mkdir()
    tensors = {name: numbers(name, tuple(shape)) for name, shape in case["tensors"].items()}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    config = case["config"] | {"base_model_name_or_path": str(base)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
